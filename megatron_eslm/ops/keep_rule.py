"""The keep rule: value-at-risk over the scores of all data-parallel ranks.

Source: eqs. (1) and (2) of the ESLM paper, in empirical form (docs/design.md): keep the
k = max(1, floor((1 - alpha) N + 1e-9)) largest of N scores. Ties at the threshold go to the lower
global index; tau is the smallest kept score.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_eslm.parallel.collectives import all_gather_same_shape

EXCLUDED = -math.inf
"""Score of excluded entries: padding, masked labels, rows dropped earlier."""


@dataclass(frozen=True)
class KeepDecision:
    """Result of the keep rule; counts and thresholds cover the full group."""

    keep: torch.Tensor
    """bool, shape of the local scores."""
    tau: float
    """Smallest kept score (VaR); nan if nothing could be kept."""
    cvar: float
    """CVaR (eq. 2) at tau."""
    num_scores: int
    """N: scores that are not EXCLUDED, over all ranks."""
    num_kept: int
    """k, over all ranks."""
    num_nonfinite: int
    """Scores that are nan or +inf, over all ranks; they count as the riskiest."""


def num_to_keep(num_scores: int, alpha: float) -> int:
    """k of the keep rule: at alpha 0.1, 12 give 10, 8 give 7, 4 give 3; alpha 0 keeps all."""
    return max(1, math.floor((1.0 - alpha) * num_scores + 1e-9)) if num_scores else 0


class StepShape(NamedTuple):
    """Micro-batches per data-parallel rank in an optimizer step."""

    micro_steps: int
    rows: int
    """Rows per micro-batch of one rank."""

    def kept(self, alpha: float) -> StepShape:
        """The shape after sequences are selected per step.

        Keeps (1 - alpha) of the micro-steps, rounded to the nearest integer; if that is all of
        them, (1 - alpha) of the rows of each. Halves round up: at alpha 0.1, 10 micro-steps become
        9, 5 of 4 rows stay unchanged, 5 of 12 rows become 5 of 11.
        """
        micro_steps = _nearest((1.0 - alpha) * self.micro_steps)
        if micro_steps < self.micro_steps:
            return StepShape(micro_steps, self.rows)
        return StepShape(self.micro_steps, _nearest((1.0 - alpha) * self.rows))

    @property
    def sequences(self) -> int:
        """Sequences per rank."""
        return self.micro_steps * self.rows


def _nearest(share: float) -> int:
    return max(1, math.floor(share + 0.5 + 1e-9))


def keep_riskiest(
    scores: torch.Tensor, alpha: float, group: dist.ProcessGroup | None = None
) -> KeepDecision:
    """Keep the riskiest 1 - alpha of the scores of all ranks of `group`.

    Args:
        scores: float32, any shape, the same shape on every rank; EXCLUDED entries are ignored. The
            global index is (rank, position in the flattened tensor).
        alpha: share to drop, in [0, 1).
        group: ranks that share one threshold; None thresholds this rank alone.

    Returns:
        KeepDecision, with `keep` for this rank's scores. `scores` is not changed.
    """
    assert scores.dtype == torch.float32, scores.dtype
    everyone = all_gather_same_shape(scores, group)
    rank = group.rank() if group is not None else 0
    decision = _decide(everyone.reshape(-1), alpha)
    keep = decision.keep.view(everyone.shape)
    return dataclasses.replace(decision, keep=keep[rank])


def keep_number(scores_N: torch.Tensor, num: int) -> KeepDecision:
    """Keep exactly the `num` riskiest scores; EXCLUDED ones last, ties to the lower index.

    Args:
        scores_N: float32, all scores that share one threshold.
        num: 1 to N.

    Returns:
        KeepDecision with CVaR nan.
    """
    assert scores_N.dtype == torch.float32, scores_N.dtype
    assert 1 <= num <= len(scores_N), (num, len(scores_N))
    nonfinite_N = _nonfinite(scores_N)
    sorted_N, order_N = torch.where(nonfinite_N, math.inf, scores_N).sort(
        descending=True, stable=True
    )
    keep_N = torch.zeros_like(nonfinite_N)
    keep_N[order_N[:num]] = True
    takes_part_N = sorted_N != EXCLUDED
    num_scores, num_nonfinite = torch.stack([takes_part_N.sum(), nonfinite_N.sum()]).tolist()
    lowest = min(num, num_scores)
    tau = float(sorted_N[lowest - 1]) if lowest else math.nan
    return KeepDecision(keep_N, tau, math.nan, num_scores, num, num_nonfinite)


def _nonfinite(scores: torch.Tensor) -> torch.Tensor:
    return torch.isnan(scores) | (scores == math.inf)


def _decide(flat_N: torch.Tensor, alpha: float) -> KeepDecision:
    """Apply the keep rule to all scores, in order of global index."""
    nonfinite_N = _nonfinite(flat_N)
    flat_N = torch.where(nonfinite_N, math.inf, flat_N)
    takes_part_N = flat_N != EXCLUDED

    num_nonfinite, num_scores = torch.stack([nonfinite_N.sum(), takes_part_N.sum()]).tolist()
    k = num_to_keep(num_scores, alpha)
    if k == 0:
        nothing = torch.zeros_like(flat_N, dtype=torch.bool)
        return KeepDecision(nothing, math.nan, math.nan, 0, 0, 0)

    if k == num_scores:
        keep_N = takes_part_N
        tau = flat_N[takes_part_N].min()
    else:
        # EXCLUDED entries sort below every score, so the k-th largest of all is the threshold.
        tau = flat_N.kthvalue(flat_N.numel() - k + 1).values
        above_N, tie_N = flat_N > tau, flat_N == tau
        keep_N = above_N | (tie_N & (tie_N.cumsum(0) <= k - above_N.sum()))
    excess = torch.where(takes_part_N, flat_N - tau, 0.0).clamp_(min=0.0).sum(dtype=torch.float64)
    cvar = tau.double() + excess / ((1.0 - alpha) * num_scores)
    tau_value, cvar_value = torch.stack([tau.double(), cvar]).tolist()
    return KeepDecision(keep_N, tau_value, cvar_value, num_scores, k, num_nonfinite)
