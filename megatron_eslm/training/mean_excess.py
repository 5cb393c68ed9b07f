"""Mean excess loss of a step, for `--eslm-overtaken`.

It is the mean over the tokens of kept sequences, the only ones that pass through the whole model.
Kept sequences have more excess than dropped ones, so selection stops later than the mean over all
candidates would say, never earlier. Where only sequences are selected, it is the early exit's
excess over all candidates, which falls later than the model's.
"""

from __future__ import annotations

import torch

from megatron_eslm.selection.state import SelectionRecord

NUM_SUMS = 4
"""Length of what `excess_sums` returns."""


def excess_sums(records: list[SelectionRecord], device: torch.device) -> torch.Tensor:
    """Sums and counts of this rank's finite scores, to be added over ranks.

    Returns:
        float64 [4]: sum and number over tokens of kept sequences, and over candidates.
    """
    totals = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
    for record in records:
        if record.token_scores_MT is not None:
            totals[:2] += _sum_and_count(record.token_scores_MT).to(device)
        if record.instance_scores_M is not None:
            totals[2:] += _sum_and_count(record.instance_scores_M).to(device)
    return totals


def mean_excess(sums: list[float]) -> float | None:
    """The mean excess of a step from its sums; None if nothing was scored."""
    tokens, candidates = (
        total / count if count else None for total, count in zip(sums[::2], sums[1::2], strict=True)
    )
    return candidates if tokens is None else tokens


def _sum_and_count(scores: torch.Tensor) -> torch.Tensor:
    finite = scores.isfinite()
    return torch.stack([scores.where(finite, 0.0).sum(dtype=torch.float64), finite.sum().double()])
