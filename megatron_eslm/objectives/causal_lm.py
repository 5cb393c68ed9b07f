"""The causal language modelling loss over kept tokens, normalised over the global micro-step."""

from __future__ import annotations

import torch


def causal_lm_loss(loss_K: torch.Tensor, num_kept_global: int, dp_size: int) -> torch.Tensor:
    """This rank's term of the mean loss over the kept tokens of all data-parallel ranks.

    The engine averages gradients over data-parallel ranks, so the local sum is scaled by their
    number: the average of the terms is then sum / count over all of them, however unequal the
    counts are (a mean of per-rank means would be wrong as soon as they differ).

    Args:
        loss_K: float32 [K], losses of this rank's kept tokens; K may be 0.
        num_kept_global: kept tokens of all data-parallel ranks.
        dp_size: number of data-parallel ranks.

    Returns:
        float32 scalar; with K = 0 it is zero and sends zero gradients.
    """
    return loss_K.sum() * (dp_size / max(1, num_kept_global))
