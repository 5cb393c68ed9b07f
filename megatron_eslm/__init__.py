"""GPT pretraining with risk-averse selective language modeling (ESLM)."""

import warnings

# megatron-core says so four times wherever it is imported first; neither is needed here.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

__version__ = "0.1.0"
