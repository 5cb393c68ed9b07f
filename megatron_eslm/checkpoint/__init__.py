"""Layout-independent checkpoints: save, find, load, resume."""
