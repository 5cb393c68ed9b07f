"""Evaluation on tasks: lm-eval's tasks, with our models."""
