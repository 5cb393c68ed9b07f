"""Kept rows dealt evenly: the plan by its promises, the exchange against a gather of everything."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.ops.balance_rows import RowPlan, balance_rows, plan_rows, return_rows
from tests.harness import run_ranks

ROWS = 5


def mask(counts: list[int], seed: int = 0) -> torch.Tensor:
    """bool [R, ROWS] with so many kept rows on each rank."""
    rng = random.Random(seed)
    kept = torch.zeros(len(counts), ROWS, dtype=torch.bool)
    for rank, count in enumerate(counts):
        kept[rank, rng.sample(range(ROWS), count)] = True
    return kept


def num_moved(plan: RowPlan) -> int:
    ranks = range(plan.num_ranks)
    return sum(len(set(plan.rows_of(rank)) - set(plan.kept_by(rank))) for rank in ranks)


@pytest.mark.parametrize("seed", range(30))
def test_even_complete_and_no_more_moved_than_needed(seed: int) -> None:
    rng = random.Random(seed)
    counts = [rng.randint(0, ROWS) for _ in range(rng.randint(1, 6))]
    kept = mask(counts, seed)
    plan = plan_rows(kept)
    rows_of = [plan.rows_of(rank).tolist() for rank in range(plan.num_ranks)]
    assert sorted(itertools.chain(*rows_of)) == kept.flatten().nonzero().flatten().tolist()
    assert all(rows == sorted(rows) for rows in rows_of)
    share = -(-sum(counts) // len(counts))
    assert plan.largest == max(map(len, rows_of)) == share
    # No less than what ranks have above that can do.
    assert num_moved(plan) == sum(max(0, count - share) for count in counts)
    # Nobody gets more than the share rounded down while somebody else has less.
    low = sum(counts) // len(counts)
    gained = [len(rows) > max(count, low) for rows, count in zip(rows_of, counts, strict=True)]
    assert not any(gained) or min(map(len, rows_of)) >= low


def test_nothing_moves_where_shares_are_even() -> None:
    assert num_moved(plan_rows(mask([3, 2, 3]))) == 0
    assert num_moved(plan_rows(mask([0, 0]))) == 0


CASES = ([5, 1, 3], [5, 0, 0], [1, 1, 0], [2, 2, 2], [0, 0, 0])


def test_rows_arrive_and_gradients_return() -> None:
    def fn(rank: int) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            for counts in CASES:
                kept = mask(counts)
                plan = plan_rows(kept)
                # What a row holds says which one it is.
                rows = torch.arange(3 * ROWS).view(3, ROWS)[rank][kept[rank]]
                x = (10 * rows[:, None, None] + torch.arange(4).view(2, 2)).to(dtype)
                before = x.clone()
                if dtype.is_floating_point:
                    x.requires_grad_()
                out = balance_rows(x, plan, dist.group.WORLD)
                mine = torch.from_numpy(plan.rows_of(rank))
                expected = (10 * mine[:, None, None] + torch.arange(4).view(2, 2)).to(dtype)
                assert torch.equal(out, expected), (rank, counts)
                assert torch.equal(x, before)
                assert torch.equal(return_rows(out.detach(), plan, dist.group.WORLD), before)
                if dtype.is_floating_point:
                    out.backward(3 * expected)
                    assert torch.equal(x.grad, 3 * before)

    run_ranks(3, fn)


def test_one_rank_alone_keeps_what_it_has() -> None:
    x = torch.randn(3, 2)
    assert balance_rows(x, plan_rows(mask([3])), None) is x
