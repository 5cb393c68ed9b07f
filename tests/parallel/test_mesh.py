from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.mesh import build_mesh, check_layout

from ..harness import run_ranks


@pytest.mark.parametrize(
    ("world", "tp", "pp", "dp"), [(1, 1, 1, 1), (4, 2, 1, 2), (4, 1, 2, 2), (8, 2, 2, 2)]
)
def test_data_parallel_size_is_what_is_left(world: int, tp: int, pp: int, dp: int) -> None:
    assert check_layout(world, tp, pp) == dp


def test_layouts_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"6 processes cannot be divided.*2 x .*2 = 4"):
        check_layout(6, 2, 2)
    with pytest.raises(ConfigError, match=r"--tensor-model-parallel-size 0 .* must be 1 or more"):
        check_layout(1, 0, 1)
    with pytest.raises(ConfigError, match=r"--pipeline-model-parallel-size -1 must be 1 or more"):
        check_layout(1, 1, -1)


@pytest.mark.parametrize(
    ("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)], ids=lambda n: str(n)
)
def test_ranks_and_groups_of_four(tp: int, pp: int) -> None:
    """Tensor fastest, then data, then pipeline, as DeepSpeed's topology numbers them."""

    def on_rank(rank: int) -> tuple:
        mesh = build_mesh(tp, pp)
        assert mesh.rank == rank
        assert mesh.world_size == 4
        members = []
        for group, size, place in (
            (mesh.tp_group, mesh.tp_size, mesh.tp_rank),
            (mesh.dp_group, mesh.dp_size, mesh.dp_rank),
            (mesh.pp_group, mesh.pp_size, mesh.pp_rank),
        ):
            assert (group.size(), group.rank()) == (size, place)
            ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
            dist.all_gather(ranks, torch.tensor([rank]), group=group)
            members.append([int(x) for x in ranks])
        return members

    dp = 4 // (tp * pp)
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    for rank, (tp_ranks, dp_ranks, pp_ranks) in enumerate(run_ranks(4, on_rank)):
        place = topology.get_coord(rank)
        assert tp_ranks == topology.filter_match(pipe=place.pipe, data=place.data)
        assert dp_ranks == topology.filter_match(pipe=place.pipe, model=place.model)
        assert pp_ranks == topology.filter_match(data=place.data, model=place.model)


def test_one_process(process_group: None) -> None:
    mesh = build_mesh()
    assert (mesh.tp_size, mesh.dp_size, mesh.pp_size, mesh.rank) == (1, 1, 1, 0)
    with pytest.raises(ConfigError, match="1 processes"):
        build_mesh(tp=2)
