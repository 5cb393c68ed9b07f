"""Kept rows dealt evenly to data-parallel ranks.

Global thresholds let one rank keep more rows than another, and a step takes as long as the rank
that has most of them. Which rows are kept is known to all ranks, so all of them can work out who
hands which rows to whom, and only rows that change hands travel: their hidden states forward,
their gradients back.

Shape legend: R ranks, M rows that each of them read, K kept rows of this rank, B rows of this rank
after the exchange.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class RowPlan:
    """Who works on which kept row. Rows have the number rank * M + row."""

    rows_of: tuple[tuple[int, ...], ...]
    """R lists: the rows that each rank works on, ascending."""
    kept_by: tuple[tuple[int, ...], ...]
    """R lists: the rows that each rank kept of those that it read, ascending."""


def plan_rows(kept_RM: torch.Tensor) -> RowPlan:
    """Deal all kept rows so that no rank has two more than another, moving as few as can be.

    Ranks that kept most get the rows that are left over (the lower rank first); those with too many
    hand over their last ones, to the lowest ranks that lack some.

    Args:
        kept_RM: bool [R, M], the same on every rank.
    """
    num_ranks, num_rows = kept_RM.shape
    kept_by = [
        [rank * num_rows + row for row, kept in enumerate(rows) if kept]
        for rank, rows in enumerate(kept_RM.tolist())
    ]
    total = sum(map(len, kept_by))
    richest = sorted(range(num_ranks), key=lambda rank: (-len(kept_by[rank]), rank))
    fair = dict.fromkeys(richest, total // num_ranks)
    for rank in richest[: total % num_ranks]:
        fair[rank] += 1
    has = [list(rows) for rows in kept_by]
    spare = [row for rank in range(num_ranks) for row in has[rank][fair[rank] :]]
    for rank in range(num_ranks):
        del has[rank][fair[rank] :]
    for rank in range(num_ranks):
        lacks = fair[rank] - len(has[rank])
        has[rank] += spare[:lacks]
        del spare[:lacks]
    return RowPlan(
        rows_of=tuple(tuple(sorted(rows)) for rows in has),
        kept_by=tuple(map(tuple, kept_by)),
    )


def balance_rows(
    x_KX: torch.Tensor, plan: RowPlan, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Exchange rows as planned. Collective, unless no row changes hands.

    Args:
        x_KX: [K, ...], the rows that this rank kept, ascending.
        plan: the same on every rank.
        group: the data-parallel ranks; None is this rank alone.

    Returns:
        [B, ...], the rows that this rank works on, ascending. Gradients go back to where the rows
        came from.
    """
    if group is None or group.size() == 1 or plan.rows_of == plan.kept_by:
        return x_KX
    return _BalanceRows.apply(x_KX, plan, group)


def return_rows(x_BX: torch.Tensor, plan: RowPlan, group: dist.ProcessGroup | None) -> torch.Tensor:
    """What a rank found out of the rows that it works on, to the ranks that kept them. Collective.

    Args:
        x_BX: [B, ...]; no gradient flows.

    Returns:
        [K, ...], ascending.
    """
    if group is None or group.size() == 1 or plan.rows_of == plan.kept_by:
        return x_BX
    return _exchange(x_BX, plan.rows_of, plan.kept_by, group)


class _BalanceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_KX: torch.Tensor, plan: RowPlan, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.plan, ctx.group = plan, group
        return _exchange(x_KX, plan.kept_by, plan.rows_of, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _exchange(grads[0], ctx.plan.rows_of, ctx.plan.kept_by, ctx.group), None, None


_RowsOfRanks = tuple[tuple[int, ...], ...]


def _exchange(
    x: torch.Tensor, before: _RowsOfRanks, after: _RowsOfRanks, group: dist.ProcessGroup
) -> torch.Tensor:
    """Rows of all ranks from where they are to where they shall be."""
    rank, ranks = group.rank(), range(group.size())
    place = {row: i for i, row in enumerate(before[rank])}

    def between(source: int, target: int) -> list[int]:
        if source == target:
            return []
        theirs = set(after[target])
        return [row for row in before[source] if row in theirs]

    leaving = [between(rank, other) for other in ranks]
    arriving = [between(other, rank) for other in ranks]
    index = torch.tensor([place[row] for rows in leaving for row in rows], dtype=torch.int64)
    sent = x.index_select(0, index.to(x.device))
    received = x.new_empty(sum(map(len, arriving)), *x.shape[1:])
    dist.all_to_all_single(
        received, sent, [len(rows) for rows in arriving], [len(rows) for rows in leaving], group
    )
    # Where each row of the result is: among those that stay, or behind them among the arrivals.
    behind = enumerate(itertools.chain(*arriving), start=len(before[rank]))
    place |= {row: i for i, row in behind}
    order = torch.tensor([place[row] for row in after[rank]], dtype=torch.int64)
    return torch.cat([x, received]).index_select(0, order.to(x.device))
