"""`--compile`: compile the blocks with torch.compile."""

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
    """Compile each block in place; parameters keep their names.

    Under global thresholds the number of rows that a rank keeps changes from step to step. torch
    compiles for the first number it sees, once more for any number, and for 0 and 1 if they occur;
    all blocks share that code. Evaluation, and a last MLP with a backward pass over kept tokens,
    compile separately. The head is not compiled: it is a custom operation.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def check_compiler() -> None:
    """Raise ConfigError if torch.compile would fail in the first step for lack of a compiler."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "--compile needs Triton, which comes with torch's CUDA builds but is not "
                "installed here. Install it, or train without --compile."
            )
        if c_compiler() is None:
            raise ConfigError(
                "--compile needs a C compiler for Triton's launchers, but none is on PATH (gcc or "
                "clang) or named in CC. Install one, or train without --compile."
            )
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            "--compile needs a C++ compiler, but there is no g++ on PATH. Install it, name another "
            "one in CXX, or train without --compile."
        )
