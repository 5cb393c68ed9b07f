"""The GPT: layers, early exit, selectors and head."""
