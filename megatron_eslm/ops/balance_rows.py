"""Kept rows dealt evenly to data-parallel ranks.

Global thresholds let one rank keep more rows than another, and a step takes as long as the rank
that has most of them. Which rows are kept is known to all ranks, so all of them can work out who
hands which rows to whom, and only rows that change hands travel: their hidden states forward,
their gradients back.

Shape legend: R ranks, M rows that each of them read, A kept rows of all ranks, K of this one, B
rows of this rank after the exchange.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Who works on which kept row. Rows have the number rank * M + row."""

    num_ranks: int
    num_rows: int
    """R * M."""
    row_A: np.ndarray
    """int64, ascending."""
    reader_A: np.ndarray
    """int64, the rank that read it."""
    worker_A: np.ndarray
    """int64, the rank that works on it."""

    def kept_by(self, rank: int) -> np.ndarray:
        """int64 [K], rows that a rank kept of those that it read, ascending."""
        return self.row_A[self.reader_A == rank]

    def rows_of(self, rank: int) -> np.ndarray:
        """int64 [B], rows that a rank works on, ascending."""
        return self.row_A[self.worker_A == rank]

    @functools.cached_property
    def moves_any(self) -> bool:
        """Whether a row changes hands."""
        return bool((self.reader_A != self.worker_A).any())

    @functools.cached_property
    def largest(self) -> int:
        """Rows of the rank that works on most."""
        return int(np.bincount(self.worker_A, minlength=1).max())

    @functools.cached_property
    def position_A(self) -> np.ndarray:
        """int64, where each row is among those of its worker."""
        order = np.argsort(self.worker_A, kind="stable")
        starts = np.searchsorted(self.worker_A[order], np.arange(self.num_ranks))
        position_A = np.empty_like(self.row_A)
        position_A[order] = np.arange(len(order)) - starts[self.worker_A[order]]
        return position_A


def plan_rows(kept_RM: torch.Tensor) -> RowPlan:
    """Deal kept rows so that no rank has more than the fair share rounded up, moving fewest.

    A rank with more hands its last rows over, to the ranks that lack most of the share rounded
    down (the lower ones first), then to any with room.

    Args:
        kept_RM: bool [R, M], the same on every rank.
    """
    mask = kept_RM.cpu().numpy()
    return _plan(mask.tobytes(), *mask.shape)


@functools.lru_cache(maxsize=16)  # the selector and the head of one micro-step ask for the same
def _plan(mask: bytes, num_ranks: int, num_rows: int) -> RowPlan:
    kept_RM = np.frombuffer(mask, dtype=np.bool_).reshape(num_ranks, num_rows)
    row_A = np.flatnonzero(kept_RM)
    reader_A = row_A // num_rows
    kept_R = kept_RM.sum(axis=1)
    fair, left_over = divmod(len(row_A), num_ranks)
    most = fair + (left_over > 0)
    place_A = np.arange(len(row_A)) - (np.cumsum(kept_R) - kept_R)[reader_A]
    spare_A = place_A >= most
    lacks_R = np.maximum(fair - kept_R, 0)
    room_R = np.maximum(most - kept_R, 0) - lacks_R
    ranks_R = np.arange(num_ranks)
    takers = np.concatenate([np.repeat(ranks_R, lacks_R), np.repeat(ranks_R, room_R)])
    worker_A = reader_A.copy()
    worker_A[spare_A] = takers[: int(spare_A.sum())]
    return RowPlan(num_ranks, num_ranks * num_rows, row_A, reader_A, worker_A)


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
    if group is None or not plan.moves_any:
        return x_KX
    return _BalanceRows.apply(x_KX, *_sides(plan, group.rank()), group)


def return_rows(x_BX: torch.Tensor, plan: RowPlan, group: dist.ProcessGroup | None) -> torch.Tensor:
    """What a rank found out of the rows that it works on, to the ranks that kept them. Collective.

    Args:
        x_BX: [B, ...]; no gradient flows.

    Returns:
        [K, ...], ascending.
    """
    if group is None or not plan.moves_any:
        return x_BX
    before, after = _sides(plan, group.rank())
    return _exchange(x_BX, after, before, group)


class _Side(NamedTuple):
    """A rank's rows before or after the exchange."""

    stay: torch.Tensor
    """int64, places of the rows that it has before and after."""
    move: torch.Tensor
    """int64, places of the others, by the rank on the other side."""
    counts: list[int]
    """R numbers: rows of `move` by that rank."""


@functools.lru_cache(maxsize=16)
def _sides(plan: RowPlan, rank: int) -> tuple[_Side, _Side]:
    return (
        _side(plan.worker_A[plan.reader_A == rank], rank, plan.num_ranks),
        _side(plan.reader_A[plan.worker_A == rank], rank, plan.num_ranks),
    )


def _side(other_X: np.ndarray, rank: int, num_ranks: int) -> _Side:
    """Args: other_X: which rank has each of this rank's rows on the other side."""
    move = np.flatnonzero(other_X != rank)
    move = move[np.argsort(other_X[move], kind="stable")]
    return _Side(
        torch.from_numpy(np.flatnonzero(other_X == rank)),
        torch.from_numpy(move),
        np.bincount(other_X[move], minlength=num_ranks).tolist(),
    )


class _BalanceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_KX: torch.Tensor, before: _Side, after: _Side, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.before, ctx.after, ctx.group = before, after, group
        return _exchange(x_KX, before, after, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(grads[0], ctx.after, ctx.before, ctx.group), None, None, None


def _exchange(x: torch.Tensor, here: _Side, there: _Side, group: dist.ProcessGroup) -> torch.Tensor:
    """Rows of all ranks from where they are to where they shall be."""
    sent = x.index_select(0, here.move.to(x.device))
    received = x.new_empty(len(there.move), *x.shape[1:])
    dist.all_to_all_single(received, sent, there.counts, here.counts, group)
    out = x.new_empty(len(there.stay) + len(there.move), *x.shape[1:])
    out[there.stay.to(x.device)] = x.index_select(0, here.stay.to(x.device))
    out[there.move.to(x.device)] = received
    return out
