"""The keep rule: value-at-risk over the scores of all data-parallel ranks.

Source: eqs. (1) and (2) of the ESLM paper, in empirical form (docs/design.md): keep the
k = max(1, floor((1 - alpha) N + 1e-9)) largest of N scores. Ties at the threshold go to the lower
global index; tau is the smallest kept score.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
    numbers: torch.Tensor
    """float64 [5] on the device of the scores: `tau`, `cvar` and the three counts. The properties
    of these names make the host wait for them."""

    @functools.cached_property
    def _read(self) -> list[float]:
        return self.numbers.tolist()

    @property
    def tau(self) -> float:
        """Smallest kept score (VaR); nan where nothing could be kept."""
        return self._read[0]

    @property
    def cvar(self) -> float:
        """CVaR (eq. 2) at tau; nan where an exact number was kept."""
        return self._read[1]

    @property
    def num_scores(self) -> int:
        """N: scores that took part, over all ranks."""
        return int(self._read[2])

    @property
    def num_kept(self) -> int:
        """k, over all ranks."""
        return int(self._read[3])

    @property
    def num_nonfinite(self) -> int:
        """Scores that were nan or +inf, over all ranks; they count as the riskiest."""
        return int(self._read[4])


def num_to_keep(num_scores: int, alpha: float) -> int:
    """k of the keep rule: at alpha 0.1, 12 give 10, 8 give 7, 4 give 3; alpha 0 keeps all."""
    return max(1, math.floor((1.0 - alpha) * num_scores + 1e-9)) if num_scores else 0


def indices_of(keep_N: torch.Tensor, known: int | None) -> torch.Tensor:
    """int64, where a mask is true, ascending.

    Args:
        keep_N: bool [N].
        known: how often; None makes the host wait for it.
    """
    if known is None:
        return keep_N.nonzero().squeeze(1)
    return torch.nonzero_static(keep_N, size=known).squeeze(1)


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
    return KeepDecision(decision.keep.view(everyone.shape)[rank], decision.numbers)


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
    scores = _Sorted.of(scores_N)
    keep_N = scores.first(torch.full_like(scores.num_scores, num))
    lowest = torch.minimum(torch.full_like(scores.num_scores, num), scores.num_scores)
    tau = scores.lowest_of(lowest)
    numbers = (tau, torch.full_like(tau, math.nan), scores.num_scores, num, scores.num_nonfinite)
    return KeepDecision(keep_N, _stacked(numbers))


class _Sorted(NamedTuple):
    """Scores in descending order; those that are not finite count as infinite."""

    flat_N: torch.Tensor
    values_N: torch.Tensor
    order_N: torch.Tensor
    num_scores: torch.Tensor
    """int64 scalar; scores that take part come first in the order."""
    num_nonfinite: torch.Tensor

    @classmethod
    def of(cls, scores_N: torch.Tensor) -> _Sorted:
        nonfinite_N = torch.isnan(scores_N) | (scores_N == math.inf)
        flat_N = torch.where(nonfinite_N, math.inf, scores_N)
        values_N, order_N = flat_N.sort(descending=True, stable=True)
        num_scores = (flat_N != EXCLUDED).sum()
        return cls(flat_N, values_N, order_N, num_scores, nonfinite_N.sum())

    def first(self, num: torch.Tensor) -> torch.Tensor:
        """bool [N], the first `num` in the order, ties to the lower index."""
        ranks_N = torch.arange(len(self.flat_N), device=self.flat_N.device)
        return torch.empty_like(self.order_N, dtype=torch.bool).scatter_(
            0, self.order_N, ranks_N < num
        )

    def lowest_of(self, num: torch.Tensor) -> torch.Tensor:
        """float64 scalar, the `num`-th score; nan for 0."""
        if not len(self.values_N):
            return torch.full_like(num, math.nan, dtype=torch.float64)
        found = self.values_N.gather(0, (num - 1).clamp(min=0).reshape(1)).squeeze(0).double()
        return torch.where(num > 0, found, math.nan)


def _stacked(numbers: Sequence[torch.Tensor | int]) -> torch.Tensor:
    like = next(number for number in numbers if isinstance(number, torch.Tensor))
    return torch.stack(
        [
            number.double()
            if isinstance(number, torch.Tensor)
            else torch.full_like(like, number, dtype=torch.float64)
            for number in numbers
        ]
    )


def _decide(flat_N: torch.Tensor, alpha: float) -> KeepDecision:
    """The keep rule over all scores in the order of their global index, without a wait."""
    scores = _Sorted.of(flat_N)
    count = scores.num_scores.double()
    # num_to_keep on the device, in the same arithmetic.
    k = torch.floor((1.0 - alpha) * count + 1e-9).clamp(min=1.0).minimum(count).long()
    keep_N = scores.first(k)
    tau = scores.lowest_of(k)
    above_N = torch.where(scores.flat_N != EXCLUDED, scores.flat_N - tau.float(), 0.0)
    excess = above_N.clamp_(min=0.0).sum(dtype=torch.float64)
    cvar = tau + excess / ((1.0 - alpha) * count)
    return KeepDecision(keep_N, _stacked((tau, cvar, scores.num_scores, k, scores.num_nonfinite)))
