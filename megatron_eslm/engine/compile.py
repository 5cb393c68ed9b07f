"""`--compile`: compile the blocks with torch.compile; on CUDA the default."""

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


def resolve_compile(wanted: bool | None, why_eager: str | None) -> tuple[bool, str | None]:
    """Resolve `--compile` for the device of this process.

    Args:
        wanted: by the flag; None without one: on CUDA, if nothing is in the way.
        why_eager: why this run's blocks cannot be compiled; None if they can.

    Returns:
        whether to compile, and what keeps a CUDA device from what would be its default.

    Raises:
        ConfigError: it is wanted, but a compiler is missing.
    """
    if wanted is not None:
        lacking = lacking_compiler() if wanted else None
        if lacking is not None:
            raise ConfigError(f"--compile needs {lacking}, or train without --compile.")
        return wanted, None
    if not torch.cuda.is_available():
        return False, None
    lacking = lacking_compiler()
    obstacle = why_eager or (f"it needs {lacking}" if lacking is not None else None)
    return obstacle is None, obstacle


def lacking_compiler() -> str | None:
    """What torch.compile lacks and would miss in the first step, with the remedy; or None."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return (
                "Triton, which comes with torch's CUDA builds but is not installed here. Install it"
            )
        if c_compiler() is None:
            return (
                "a C compiler for Triton's launchers, but none is on PATH (gcc or clang) or named "
                "in CC. Install one"
            )
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        return "a C++ compiler, but there is no g++ on PATH. Install it, name another one in CXX"
    return None
