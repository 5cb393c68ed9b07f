"""The vocabulary head, without all of its logits in memory."""
