"""Table of what runs have reached by the time they have spent a budget of FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.quantities import loss
from megatron_eslm.reports.runs import Run
from megatron_eslm.reports.tables import Table

_LEDGERS = (("flops", "executed"), ("flops_paper", "paper's count"))


def budget_tables(groups: Sequence[Group], budgets: Sequence[float]) -> list[Table]:
    """The table, if budgets are given.

    Args:
        groups: groups of runs.
        budgets: FLOPs, each for both ledgers.
    """
    if not budgets:
        return []
    columns = [(budget, *ledger) for budget in budgets for ledger in _LEDGERS]
    rows = []
    for group in groups:
        spreads = [
            group.spread(lambda run, budget=budget, name=name: loss_at(run, name, budget))  # type: ignore[misc]
            for budget, name, _ in columns
        ]
        rows.append([group.title, *(s.text(loss) if s else "n/a" for s in spreads)])
    return [
        Table(
            "Validation loss by the time a budget of FLOPs is spent",
            ["", *(f"{budget:.3g} {title}" for budget, _, title in columns)],
            rows,
            "Linear between evaluations: mean over seeds, in brackets lowest and highest; n/a "
            "where a run ended before. The learning rate of a run that goes on has not decayed by "
            "then, so a run that ends at the budget (--train-flops) ends lower.",
        )
    ]


def loss_at(run: Run, name: str, budget: float) -> float | None:
    """Validation loss when a running total is at a budget, linear between evaluations.

    Args:
        run: the run.
        name: the running total, such as "flops".
        budget: where to read the loss.

    Returns:
        The loss; None before the first and after the last evaluation.
    """
    points = [
        (float(r[name]), float(r["valid_loss"])) for r in run.evaluations if r.get(name) is not None
    ]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= budget <= x1 and x0 < x1:
            share = (budget - x0) / (x1 - x0)
            return y0 + share * (y1 - y0)
    return None
