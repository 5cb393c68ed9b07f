"""Tokenizers: build, train, and convert to and from transformers."""
