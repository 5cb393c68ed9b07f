"""Which rank is where, which one died or hangs, and how a job then ends."""
