"""Which code computes the head: PyTorch, or Triton's kernels on a CUDA device.

All forms have one signature (`HeadBackend`) and differ in nothing but speed and memory: the same
statistics and gradients up to rounding, the same collectives, the same two memory modes.

Shape legend: N scored tokens, K kept tokens of a block, D hidden, V rows of this rank's shard, W of
them that a block is wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

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


class HeadBackend(Protocol):
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


def slices(length: int, step: int) -> list[slice]:
    """`length` in pieces of `step`; the last one is what is left."""
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]
