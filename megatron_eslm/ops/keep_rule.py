"""The keep rule: value-at-risk over the scores of all data-parallel ranks.

Source: eqs. (1) and (2) of the ESLM paper, in the empirical form of docs/design.md, section 4:
of N scores the k = max(1, floor((1 - alpha) N + 1e-9)) largest are kept, ties at the threshold go
to the lower global index, and tau is the smallest kept score.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_eslm.ops.balance_rows import RowPlan
from megatron_eslm.parallel.collectives import all_gather_same_shape

EXCLUDED = -math.inf
"""Score of what takes no part: padding, masked labels, rows that were dropped before."""


@dataclass(frozen=True)
class Kept:
    """What the keep rule decided; counts and thresholds are those of the whole group."""

    keep: torch.Tensor
    """bool, shape of the local scores."""
    everyone: torch.Tensor
    """bool, the same of all ranks, in the order of the global index."""
    tau: float
    """Smallest kept score (VaR); nan where nothing could be kept."""
    cvar: float
    """CVaR (eq. 2) at tau."""
    num_scores: int
    """N: scores that took part, over all ranks."""
    num_kept: int
    """k, over all ranks."""
    num_nonfinite: int
    """Scores that were nan or +inf, over all ranks; they count as the riskiest."""


def num_to_keep(num_scores: int, alpha: float) -> int:
    """k of the keep rule: 12 at alpha 0.1 gives 10, 8 gives 7, 4 gives 3; alpha 0 gives all."""
    return max(1, math.floor((1.0 - alpha) * num_scores + 1e-9)) if num_scores else 0


def keep_riskiest(
    scores: torch.Tensor, alpha: float, group: dist.ProcessGroup | None = None
) -> Kept:
    """Keep the riskiest 1 - alpha of the scores of all ranks of `group`.

    Args:
        scores: float32, any shape, the same shape on every rank; EXCLUDED entries take no part.
            The global index is (rank, position in the flattened tensor).
        alpha: share to drop, in [0, 1).
        group: ranks whose scores are thresholded together; None thresholds this rank alone.

    Returns:
        Kept, with `keep` for this rank's scores. `scores` is not changed.
    """
    assert scores.dtype == torch.float32, scores.dtype
    everyone = all_gather_same_shape(scores, group)
    rank = group.rank() if group is not None else 0
    decision = _decide(everyone.reshape(-1), alpha)
    keep = decision.keep.view(everyone.shape)
    return dataclasses.replace(decision, keep=keep[rank], everyone=keep)


def keep_riskiest_of_rows(
    scores_BT: torch.Tensor,
    alpha: float,
    plan: RowPlan,
    group: dist.ProcessGroup | None,
) -> tuple[Kept, torch.Tensor]:
    """The same for rows that ranks hold in unequal numbers, and not where they were read.

    The global index is (row, position), so that it does not matter who holds a row.

    Args:
        scores_BT: float32 [B, T], of this rank's rows.
        alpha: share to drop.
        plan: who holds which rows.
        group: the ranks; None is this rank alone.

    Returns:
        (Kept with `keep` for this rank's rows and `everyone` [num_rows, T]; the scores of all
        rows, float32 [num_rows, T], EXCLUDED where nobody holds one).
    """
    assert scores_BT.dtype == torch.float32, scores_BT.dtype
    length, device = scores_BT.shape[1], scores_BT.device
    padded = scores_BT.new_full((plan.largest, length), EXCLUDED)
    padded[: len(scores_BT)] = scores_BT
    everyone = all_gather_same_shape(padded, group).view(-1, length)
    source_A = torch.from_numpy(plan.worker_A * plan.largest + plan.position_A).to(device)
    scores_all = scores_BT.new_full((plan.num_rows, length), EXCLUDED)
    scores_all[torch.from_numpy(plan.row_A).to(device)] = everyone[source_A]
    decision = _decide(scores_all.reshape(-1), alpha)
    keep = decision.keep.view(scores_all.shape)
    held_B = torch.from_numpy(plan.rows_of(group.rank() if group is not None else 0)).to(device)
    return dataclasses.replace(decision, keep=keep[held_B], everyone=keep), scores_all


def _decide(flat_N: torch.Tensor, alpha: float) -> Kept:
    """The keep rule over all scores in the order of their global index."""
    nonfinite_N = torch.isnan(flat_N) | (flat_N == math.inf)
    flat_N = torch.where(nonfinite_N, math.inf, flat_N)
    takes_part_N = flat_N != EXCLUDED

    num_nonfinite, num_scores = torch.stack([nonfinite_N.sum(), takes_part_N.sum()]).tolist()
    k = num_to_keep(num_scores, alpha)
    if k == 0:
        nothing = torch.zeros_like(flat_N, dtype=torch.bool)
        return Kept(nothing, nothing, math.nan, math.nan, 0, 0, 0)

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
    return Kept(keep_N, keep_N, tau_value, cvar_value, num_scores, k, num_nonfinite)
