"""GPT pretraining with risk-averse selective language modeling (ESLM).

What other programs use is here by name (docs/python.md), and imported when it is asked for.
"""

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_eslm.checkpoint.weights import read_weights as read_weights
    from megatron_eslm.config.run import RunConfig as RunConfig
    from megatron_eslm.config.run import parse_run as parse_run
    from megatron_eslm.launch.bootstrap import init_distributed as init_distributed
    from megatron_eslm.ops.head.functional import (
        selective_linear_cross_entropy as selective_linear_cross_entropy,
    )
    from megatron_eslm.ops.keep_rule import keep_riskiest as keep_riskiest
    from megatron_eslm.selection.policy import SelectionPolicy as SelectionPolicy
    from megatron_eslm.selection.policy import register as register
    from megatron_eslm.training.build import build_trainer as build_trainer
    from megatron_eslm.training.loop import Callback as Callback

# Before torch is imported: its C++ side would print a stack a rank for every connection that is
# closed by a rank that ended. The watchdog says which one that was.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# megatron-core says so four times wherever it is imported first; neither is needed here.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

__version__ = "0.1.0"

_HOMES = {
    "Callback": "training.loop",
    "RunConfig": "config.run",
    "SelectionPolicy": "selection.policy",
    "build_trainer": "training.build",
    "init_distributed": "launch.bootstrap",
    "keep_riskiest": "ops.keep_rule",
    "parse_run": "config.run",
    "read_weights": "checkpoint.weights",
    "register": "selection.policy",
    "selective_linear_cross_entropy": "ops.head.functional",
}
"""The module of each name above."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
