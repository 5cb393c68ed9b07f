"""`--compile`: the blocks through torch.compile."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import GPT
from megatron_eslm.model.layers import Block
from megatron_eslm.ops.head.dispatch import c_compiler


def compile_blocks(model: GPT) -> None:
    """Compile each block where it stands; parameters keep their names.

    The number of rows that a rank keeps changes from step to step under global thresholds. torch
    compiles for the first number that it sees, once more for any number, and for 0 and 1 if they
    occur; all blocks share that code. Evaluation and a last MLP whose backward pass is over kept
    tokens have code of their own. The head is not compiled: it is one operation of ours.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def check_compiler() -> None:
    """ConfigError where torch.compile would fail in the first step for want of a compiler."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "--compile needs Triton, which torch's CUDA builds bring along and this "
                "environment lacks. Install it, or train without --compile."
            )
        if c_compiler() is None:
            raise ConfigError(
                "--compile needs a C compiler, with which Triton builds its launchers, and there "
                "is none on PATH (gcc, clang; or name one in CC). Install one, or train without "
                "--compile."
            )
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            "--compile needs a C++ compiler and there is no g++ on PATH. Install it, name another "
            "one in CXX, or train without --compile."
        )
