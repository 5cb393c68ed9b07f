"""Interface of the head's backends: PyTorch, or Triton kernels on a CUDA device.

All backends implement `HeadBackend` and differ only in speed and memory: same statistics and
gradients up to rounding, same collectives, same two memory modes.

Shape legend: N scored tokens, K kept tokens of a block, D hidden, V rows of this rank's shard, W
rows (columns of the logits) of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

HeadKernel = Literal["auto", "torch", "triton", "triton-fused"]


@dataclass(frozen=True)
class GradientBlock:
    """Inputs for d loss / d logits of K tokens and W columns."""

    hidden_KD: torch.Tensor
    weight_WD: torch.Tensor
    logits_NW: torch.Tensor | None
    """Kept logits of all scored tokens, read-only; None: recompute them."""
    kept_K: torch.Tensor | None
    """int64 [K], rows of logits_NW; None: all of its rows, then N = K."""
    lse_K: torch.Tensor
    """float32 [K], log-sum-exp."""
    column_K: torch.Tensor
    """int64 [K], the label's column in this block; outside [0, W) if it is in another block."""
    grad_K: torch.Tensor
    """float32 [K], upstream gradients."""
    num_real: int
    """Columns from here on are padding."""


class BlockLimits(NamedTuple):
    """Largest size of a block of gradients."""

    numel: int
    columns: int


class HeadBackend(Protocol):
    """Functions of a head backend; each backend is a module in `ops.head`."""

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
        """Compute this rank's contribution to the statistics of every token.

        Args:
            hidden_ND: [N, D] in the compute dtype.
            weight_VD: [V, D], same dtype.
            column_N: int64 [N], the label's row of weight_VD; -1 if another rank holds it.
            num_real: rows from here on are padding; above 0.
            logits_NV: [N, V], filled with the logits, or None.
            entropy: whether to compute sum e^z z, which may be 0 otherwise.
            chunk_bytes: most bytes of a transient block of logits.

        Returns:
            (float32 [N]: the largest logit; float32 [3, N]: sum e^z and sum e^z z with z shifted by
            the largest logit, and the label's unshifted logit, 0 if another rank holds it).
        """
        ...

    def softmax_gradient(self, block: GradientBlock, out_KW: torch.Tensor) -> None:
        """Fill out_KW with (softmax(z) - onehot(label)) grad in the compute dtype; padding: 0."""
        ...

    def block_limits(self, hidden_KD: torch.Tensor, chunk_bytes: int) -> BlockLimits:
        """Largest block for `softmax_gradient` whose transient logits fit into `chunk_bytes`."""
        ...


def slices(length: int, step: int) -> list[slice]:
    """Split `length` into slices of `step`; the last one may be shorter."""
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]
