"""Which code computes the head: PyTorch, or Triton's kernels on a CUDA device.

All forms have one signature (`HeadForm`) and differ in nothing but speed and memory: the same
statistics and gradients up to rounding, the same collectives, the same two memory modes.

Shape legend: N scored tokens, K kept tokens of a block, D hidden, V rows of this rank's shard, W of
them that a block is wide.
"""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from megatron_eslm.errors import ConfigError

HeadKernel = Literal["auto", "torch", "triton", "triton-fused"]


@dataclass(frozen=True)
class GradientBlock:
    """Where d loss / d logits of K tokens and W columns comes from."""

    hidden_KD: torch.Tensor
    weight_WD: torch.Tensor
    logits_NW: torch.Tensor | None
    """Kept logits of all scored tokens, not to be changed; None: compute them again."""
    kept_K: torch.Tensor | None
    """int64 [K], rows of logits_NW; None: they are its K rows."""
    lse_K: torch.Tensor
    """float32 [K]."""
    column_K: torch.Tensor
    """int64 [K], the label's column of this block; anything outside [0, W) where it has none."""
    grad_K: torch.Tensor
    """float32 [K], upstream."""
    num_real: int
    """Columns from here on are padding."""


class BlockLimits(NamedTuple):
    """How large a block of gradients may be."""

    numel: int
    columns: int


class HeadForm(Protocol):
    """What a form of the head consists of; a module of ops each."""

    def partial_statistics(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        column_N: torch.Tensor,
        num_real: int,
        logits_NV: torch.Tensor | None,
        *,
        entropy: bool,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What this rank's rows of the vocabulary add to the statistics of every token.

        Args:
            hidden_ND: [N, D] in the compute type.
            weight_VD: [V, D], same type.
            column_N: int64 [N], the label's row of weight_VD; -1 where it is another rank's.
            num_real: rows from here on are padding; above 0.
            logits_NV: [N, V] to be filled with the logits, or None.
            entropy: whether to compute its sum, which is 0 otherwise.
            chunk_bytes: most bytes of a transient block of logits.

        Returns:
            (float32 [N], the largest logit; float32 [3, N], with z shifted by it: sum e^z,
            sum e^z z; and the label's logit unshifted, 0 where it is another rank's).
        """
        ...

    def softmax_gradient(self, block: GradientBlock, out_KW: torch.Tensor) -> None:
        """Fill out_KW with (softmax(z) - onehot(label)) grad in the compute type; padding: 0."""
        ...

    def block_limits(self, hidden_KD: torch.Tensor, chunk_bytes: int) -> BlockLimits:
        """The largest block for `softmax_gradient` whose transient logits take `chunk_bytes`."""
        ...


@functools.cache
def triton_imports() -> bool:
    """Whether Triton is installed and loads."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def c_compiler() -> str | None:
    """The compiler with which Triton builds its launchers, as it looks for it; None without one."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def resolve_head_kernel(
    kernel: HeadKernel, device_type: str
) -> Literal["torch", "triton", "triton-fused"]:
    """`--head-kernel` on a device: auto is Triton where there is CUDA and Triton can be used.

    Raises:
        ConfigError: Triton was asked for where it cannot run.
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
            f"--head-kernel {kernel} needs a CUDA device and this run is on {device_type}. Use "
            "--head-kernel auto or torch (TRITON_INTERPRET=1 runs the kernels in Triton's "
            "interpreter, slowly, to test them)."
        )
    if c_compiler() is None and not interpreted:
        raise ConfigError(
            f"--head-kernel {kernel} needs a C compiler, with which Triton builds its launchers, "
            "and there is none on PATH (gcc, clang; or name one in CC). Install one, or use "
            "--head-kernel torch."
        )
    return kernel


def head_form(kernel: HeadKernel, device: torch.device) -> HeadForm:
    """The module that computes the head on a device."""
    # Imported here, so that nobody needs Triton who does not use it.
    resolved = resolve_head_kernel(kernel, device.type)
    if resolved == "torch":
        from megatron_eslm.ops import head_torch

        return head_torch
    if resolved == "triton":
        from megatron_eslm.ops import head_triton

        return head_triton
    from megatron_eslm.ops import head_triton_fused

    return head_triton_fused


def slices(length: int, step: int) -> list[slice]:
    """`length` in pieces of `step`; the last one is what is left."""
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]
