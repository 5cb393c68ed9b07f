"""Tokenizers: built from files, trained, and handed to transformers and back."""
