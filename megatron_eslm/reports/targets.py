"""Cost of reaching a target validation loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.groups import Group, Spread
from megatron_eslm.reports.runs import Record


def default_target(groups: Sequence[Group], baseline: Group) -> float:
    """The worst final validation loss of the baseline's runs, which all of them reach.

    Raises:
        ConfigError: no run of the baseline ended with a finite loss.
    """
    finals = [run.evaluations[-1]["valid_loss"] for run in baseline.runs]
    finite = [loss for loss in finals if math.isfinite(loss)]
    if not finite:
        raise ConfigError(
            f"No run of {baseline.label} ended with a finite validation loss; give --target."
        )
    return max(finite)


def first_reach(evaluations: Sequence[Record], name: str, target: float) -> float | None:
    """Find where a run first reaches a validation loss, interpolating between evaluations.

    Args:
        evaluations: records with `valid_loss`, in order.
        name: the quantity to return, for instance "flops".
        target: validation loss, nats.

    Returns:
        The quantity at that point; None if the loss is never reached or the quantity is missing.
    """
    before: Record | None = None
    for record in evaluations:
        loss = record["valid_loss"]
        if loss <= target:
            if record.get(name) is None:
                return None
            if before is None or before.get(name) is None:
                return float(record[name])
            share = (before["valid_loss"] - target) / (before["valid_loss"] - loss)
            return float(before[name] + share * (record[name] - before[name]))
        # NaN and infinity cannot be interpolated.
        before = record if math.isfinite(loss) else None
    return None


@dataclass(frozen=True)
class Reach:
    """Amount of one quantity that a group needs to reach the target."""

    spread: Spread | None
    """Spread over runs; None unless all of them reach the target and have the quantity."""
    reached: int
    runs: int

    @classmethod
    def of(cls, group: Group, name: str, target: float) -> Reach:
        """Compute for a group."""
        reached = [any(r["valid_loss"] <= target for r in run.evaluations) for run in group.runs]
        spread = group.spread(lambda run: first_reach(run.evaluations, name, target))
        return cls(spread if all(reached) else None, sum(reached), len(group.runs))

    @property
    def why_not(self) -> str:
        """Text to show if there is no number."""
        if self.reached == self.runs:
            return "n/a"
        return f"{self.reached} of {self.runs} reached" if self.reached else "not reached"

    def saved_on(self, other: Reach) -> float | None:
        """Share of the other's mean that this group saves; negative if it needs more."""
        if self.spread is None or other.spread is None or not other.spread.mean:
            return None
        return 1.0 - self.spread.mean / other.spread.mean
