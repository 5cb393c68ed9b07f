"""The harness fails where it should: on an exception, a death and a hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from .harness import RankFailed, run_ranks


def test_results_come_back_in_rank_order() -> None:
    def on_rank(rank: int, scale: float) -> tuple[int, float, torch.Tensor]:
        x = torch.full((1,), scale * rank)
        dist.all_reduce(x)
        return rank, x.item(), torch.arange(rank)

    results = run_ranks(4, on_rank, 2.0)
    assert [(r, x) for r, x, _ in results] == [(i, 12.0) for i in range(4)]
    assert results[3][2].tolist() == [0, 1, 2]


def test_ranks_use_one_thread() -> None:
    assert run_ranks(2, lambda rank: torch.get_num_threads()) == [1, 1]


def test_an_exception_on_one_rank_fails_with_its_traceback() -> None:
    def on_rank(rank: int) -> None:
        if rank == 1:
            raise ValueError("this one")
        dist.barrier()

    with pytest.raises(RankFailed, match=r"rank 1 raised(?s:.)*ValueError: this one"):
        run_ranks(2, on_rank)


def test_a_death_fails() -> None:
    def on_rank(rank: int) -> None:
        if rank == 1:
            os._exit(7)
        time.sleep(60)

    with pytest.raises(RankFailed, match=r"rank 1 ended without a result \(exit code 7\)"):
        run_ranks(2, on_rank)


def test_a_hang_fails_and_leaves_no_process() -> None:
    def wait_for_ever(rank: int) -> None:
        if rank == 0:
            dist.barrier()
        else:
            time.sleep(600)

    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 did not end in time(?s:.)*wait_for_ever"):
        run_ranks(2, wait_for_ever, timeout=1.0)
    assert time.monotonic() - start < 10


def test_refuses_to_fork_a_process_group(process_group: None) -> None:
    with pytest.raises(RuntimeError, match="cannot be forked"):
        run_ranks(2, lambda rank: None)
