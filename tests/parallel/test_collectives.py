from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.collectives import (
    all_gather_same_shape,
    all_reduce_,
    on_every_rank,
    on_rank_zero,
)

from ..harness import run_ranks


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)], ids=str)
def test_all_gather_stacks_in_rank_order(shape: tuple) -> None:
    def on_rank(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full(shape, float(rank)).t() if len(shape) == 2 else torch.full(shape, rank)
        return all_gather_same_shape(x, dist.group.WORLD), x

    for gathered, x in run_ranks(3, on_rank):
        assert gathered.shape == (3, *x.shape)
        assert gathered.dtype == x.dtype
        assert all((gathered[rank] == rank).all() for rank in range(3))


def test_all_gather_of_a_view_in_another_memory_order() -> None:
    x = torch.arange(6.0).view(2, 3).t()
    gathered = run_ranks(2, lambda rank: all_gather_same_shape(x + rank, dist.group.WORLD))[0]
    assert torch.equal(gathered, torch.stack([x, x + 1]))


def test_all_gather_alone_needs_no_group() -> None:
    x = torch.arange(3)
    assert torch.equal(all_gather_same_shape(x, None), x[None])


def test_all_reduce_sums_in_place_and_refuses_a_strided_tensor() -> None:
    def on_rank(rank: int) -> tuple[bool, list[float], float]:
        x = torch.tensor([1.0, 2.0]) * (rank + 1)
        same = all_reduce_(x, dist.group.WORLD) is x
        highest = torch.tensor(float(rank))
        all_reduce_(highest, dist.group.WORLD, dist.ReduceOp.MAX)
        return same, x.tolist(), highest.item()

    assert run_ranks(2, on_rank) == [(True, [3.0, 6.0], 1.0)] * 2
    with pytest.raises(AssertionError, match="unreduced"):
        all_reduce_(torch.ones(2, 3).t(), None)


def outcome(do) -> str:
    try:
        return f"returned {do()}"
    except ConfigError as error:
        return f"raised {error}"


def test_rank_zero_decides_for_all() -> None:
    def on_rank(rank: int) -> list[str]:
        def fail() -> None:
            raise ConfigError("--save: no space")

        return [
            outcome(lambda: on_rank_zero(lambda: rank + 7)),
            outcome(lambda: on_rank_zero(fail)),
        ]

    assert run_ranks(3, on_rank) == [["returned 7", "raised --save: no space"]] * 3


def test_an_error_on_any_rank_stops_every_rank() -> None:
    def on_rank(rank: int) -> list[str]:
        def fail_on(ranks: tuple[int, ...], text: str) -> int:
            if rank in ranks:
                raise ConfigError(text.format(rank))
            return rank

        return [
            outcome(lambda: on_every_rank(lambda: fail_on((), ""))),
            outcome(lambda: on_every_rank(lambda: fail_on((1,), "truncated"))),
            outcome(lambda: on_every_rank(lambda: fail_on((0, 1, 2), "missing"))),
            outcome(lambda: on_every_rank(lambda: fail_on((0, 2), "file {}"))),
        ]

    common = ["raised truncated (on rank 1)", "raised missing", "raised file 0; file 2 (on rank 0)"]
    assert run_ranks(3, on_rank) == [[f"returned {rank}", *common] for rank in range(3)]
