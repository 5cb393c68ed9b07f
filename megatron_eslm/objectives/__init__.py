"""Losses of kept tokens: cross-entropy, distillation, uncertainty."""
