"""GPT pretraining with risk-averse selective language modeling (ESLM)."""

import os
import warnings

# Before torch is imported: its C++ side would print a stack a rank for every connection that is
# closed by a rank that ended. The watchdog says which one that was.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# megatron-core says so four times wherever it is imported first; neither is needed here.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

__version__ = "0.1.0"
