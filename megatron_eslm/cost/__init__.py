"""Cost of a run: FLOPs, memory, and the assignment of blocks to pipeline stages."""
