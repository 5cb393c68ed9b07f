"""The head over the vocabulary without all of its logits in memory."""
