"""What a run computes and holds: FLOPs, memory, and how blocks are spread over pipeline stages."""
