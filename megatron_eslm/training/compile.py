"""`--compile`: the blocks through torch.compile."""

from __future__ import annotations

import importlib.util
import shutil

import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import GPT


def compile_blocks(model: GPT) -> None:
    """Compile each block where it stands; parameters keep their names.

    The number of rows that a rank keeps changes from step to step under global thresholds. torch
    compiles for the first number that it sees, once more for any number, and for 0 and 1 if they
    occur; all blocks share that code, so it is four compilations at most.
    """
    for block in model.blocks.values():
        block.compile()


def check_compiler() -> None:
    """ConfigError where torch.compile would fail in the first step for want of a compiler."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "--compile needs Triton, which torch's CUDA builds bring along and this "
                "environment lacks. Install it, or train without --compile."
            )
    elif not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ConfigError(
            "--compile needs a C++ compiler and there is none on PATH (g++, c++, clang++). Install "
            "one, or train without --compile."
        )
