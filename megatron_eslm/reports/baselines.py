"""What a method is compared with: other methods, and random selection of the same share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import Run

BASELINES = ("clm", "random", "rho1", "greats")
"""Policies of the paper's comparisons that are not ESLM."""


def best_baseline(groups: Sequence[Group]) -> Group | None:
    """The baseline of lowest mean final loss; None if none of them ended with finite losses."""

    def final(group: Group) -> float:
        spread = group.spread(final_loss)
        return spread.mean if spread and math.isfinite(spread.mean) else math.inf

    ended = [g for g in groups if g.selection in BASELINES and final(g) < math.inf]
    return min(ended, key=final, default=None)


def controls(groups: Sequence[Group]) -> list[Group]:
    """The random controls among groups."""
    return [group for group in groups if group.selection == "random"]


def control_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The random control of a method: the one that trains on the most similar share of tokens."""
    mine = share_trained(group)

    def distance(control: Group) -> float:
        theirs = share_trained(control)
        return math.inf if mine is None or theirs is None else abs(mine - theirs)

    return min(controls(groups), key=distance, default=None)


def share_trained(group: Group) -> float | None:
    """Share of the tokens read that entered the loss; mean over runs."""

    def share(run: Run) -> float | None:
        trained, read = run.last("tokens_trained"), run.last("tokens")
        return trained / read if trained is not None and read else None

    spread = group.spread(share)
    return spread.mean if spread else None


def final_loss(run: Run) -> float:
    """Validation loss at the last evaluation."""
    return run.evaluations[-1]["valid_loss"]
