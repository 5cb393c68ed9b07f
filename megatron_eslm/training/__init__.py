"""The training loop: a run from its first to its last step."""
