"""Corpora of many files: one part a file, made anywhere, merged into one pair for each domain."""
