"""Choose the head's backend: PyTorch, or Triton kernels on a CUDA device."""

from __future__ import annotations

import functools
import os
import shutil
from typing import Literal

import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.head.contract import HeadBackend, HeadKernel


@functools.cache
def triton_imports() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def c_compiler() -> str | None:
    """Find the C compiler for Triton's launchers the way Triton does; None if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def resolve_head_kernel(
    kernel: HeadKernel, device_type: str
) -> Literal["torch", "triton", "triton-fused"]:
    """Resolve `--head-kernel` for a device: auto is Triton on CUDA if Triton can run.

    Raises:
        ConfigError: Triton is requested but cannot run.
    """
    if kernel == "auto":
        works = device_type == "cuda" and triton_imports() and c_compiler() is not None
        return "triton" if works else "torch"
    if kernel == "torch":
        return "torch"
    if not triton_imports():
        raise ConfigError(
            f"--head-kernel {kernel} needs Triton, which is not installed: pip install triton, or "
            "use --head-kernel torch."
        )
    # Read by Triton itself when it is imported.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        raise ConfigError(
            f"--head-kernel {kernel} needs a CUDA device, but this run is on {device_type}. Use "
            "--head-kernel auto or torch (TRITON_INTERPRET=1 runs the kernels in Triton's "
            "interpreter, slowly, to test them)."
        )
    if c_compiler() is None and not interpreted:
        raise ConfigError(
            f"--head-kernel {kernel} needs a C compiler for Triton's launchers, but none is on "
            "PATH (gcc or clang) or named in CC. Install one, or use --head-kernel torch."
        )
    return kernel


def head_backend(kernel: HeadKernel, device: torch.device) -> HeadBackend:
    """The backend module for a device."""
    # Imports are local so that Triton is required only if used.
    resolved = resolve_head_kernel(kernel, device.type)
    if resolved == "torch":
        from megatron_eslm.ops.head import torch_kernel as head_torch

        return head_torch
    if resolved == "triton":
        from megatron_eslm.ops.head import triton_kernel as head_triton

        return head_triton
    from megatron_eslm.ops.head import triton_fused_kernel as head_triton_fused

    return head_triton_fused
