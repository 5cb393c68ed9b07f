"""Mean excess loss over the candidates of a step, for `--eslm-overtaken`.

Tokens are scored in kept sequences only, and these have more excess than those that were dropped.
How much more the early exit has seen, on all candidates:

    tokens of kept sequences + (early exit on all candidates - early exit on kept ones)

Where only sequences are selected, it is the early exit's excess, which falls later than the
model's. Shape legend: M rows of this rank, T positions.
"""

from __future__ import annotations

import torch

from megatron_eslm.selection.state import SelectionRecord

NUM_SUMS = 6
"""Length of what `excess_sums` returns."""


def excess_sums(records: list[SelectionRecord], device: torch.device) -> torch.Tensor:
    """Sums and counts of this rank's finite scores, to be added over ranks.

    Returns:
        float64 [6]: sum and number over tokens, over candidates, and over kept candidates.
    """
    totals = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
    for record in records:
        if record.token_scores_MT is not None:
            totals[:2] += _sum_and_count(record.token_scores_MT).to(device)
        if record.instance_scores_M is not None and record.instance_kept_M is not None:
            kept_M = torch.where(record.instance_kept_M, record.instance_scores_M, torch.nan)
            totals[2:4] += _sum_and_count(record.instance_scores_M).to(device)
            totals[4:] += _sum_and_count(kept_M).to(device)
    return totals


def mean_excess(sums: list[float]) -> float | None:
    """The mean over all candidates; None if nothing was scored."""
    tokens, everyone, kept = (
        total / count if count else None for total, count in zip(sums[::2], sums[1::2], strict=True)
    )
    if tokens is None:
        return everyone
    return tokens if everyone is None or kept is None else tokens + everyone - kept


def _sum_and_count(scores: torch.Tensor) -> torch.Tensor:
    finite = scores.isfinite()
    return torch.stack([scores.where(finite, 0.0).sum(dtype=torch.float64), finite.sum().double()])
