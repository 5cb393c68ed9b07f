"""GPT pretraining with risk-averse selective language modeling (ESLM)."""

__version__ = "0.1.0"
