"""Comparisons of methods, written down in one file and run from it."""
