"""The process mesh: tensor-, data- and pipeline-parallel groups.

Tensor rank varies fastest, then data, then pipeline, as in megatron-core's default and in
DeepSpeed's PipeModelDataParallelTopology.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch.distributed as dist

from megatron_eslm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's mesh coordinates and process groups. Passed explicitly, never global."""

    tp_size: int
    dp_size: int
    pp_size: int
    tp_rank: int
    dp_rank: int
    pp_rank: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    ends_group: dist.ProcessGroup
    """First and last pipeline stage, which share the word embedding."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank reads tokens and selects sequences."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head, selects tokens and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.tp_rank + self.tp_size * (self.dp_rank + self.dp_size * self.pp_rank)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp_size * self.dp_size * self.pp_size


def check_layout(world_size: int, tp: int, pp: int) -> int:
    """Return the data-parallel size; ConfigError if TP x PP does not divide the world size."""
    if tp < 1 or pp < 1:
        raise ConfigError(
            f"--tensor-model-parallel-size {tp} and --pipeline-model-parallel-size {pp} must be 1 "
            "or more."
        )
    if world_size % (tp * pp):
        raise ConfigError(
            f"{world_size} processes cannot be divided into groups of "
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} = {tp * pp}; "
            "change the number of processes or one of the two sizes."
        )
    return world_size // (tp * pp)


def build_mesh(tp: int = 1, pp: int = 1, timeout_seconds: float | None = None) -> Mesh:
    """Build the process groups. Collective: every rank must call it.

    Args:
        tp: --tensor-model-parallel-size.
        pp: --pipeline-model-parallel-size.
        timeout_seconds: timeout of the groups' collectives; None for torch's default.

    Raises:
        ConfigError: TP x PP does not divide the number of processes.
    """
    world = dist.get_world_size()
    dp = check_layout(world, tp, pp)
    me = dist.get_rank()
    timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)

    def groups(of: list[list[int]]) -> dist.ProcessGroup:
        mine: dist.ProcessGroup | None = None
        for ranks in of:
            # new_group is collective over the world, so every rank walks the same list.
            group = dist.group.WORLD if len(ranks) == world else dist.new_group(ranks, timeout)
            if me in ranks:
                mine = group
        # A middle stage has no ends_group and never uses it, so any group will do.
        group = mine if mine is not None else dist.group.WORLD
        assert group is not None
        return group

    def rank_of(t: int, d: int, p: int) -> int:
        return t + tp * (d + dp * p)

    return Mesh(
        tp_size=tp,
        dp_size=dp,
        pp_size=pp,
        tp_rank=me % tp,
        dp_rank=me // tp % dp,
        pp_rank=me // (tp * dp),
        tp_group=groups(
            [[rank_of(t, d, p) for t in range(tp)] for p in range(pp) for d in range(dp)]
        ),
        dp_group=groups(
            [[rank_of(t, d, p) for d in range(dp)] for p in range(pp) for t in range(tp)]
        ),
        pp_group=groups(
            [[rank_of(t, d, p) for p in range(pp)] for d in range(dp) for t in range(tp)]
        ),
        ends_group=groups(
            [[rank_of(t, d, p) for p in sorted({0, pp - 1})] for d in range(dp) for t in range(tp)]
        ),
    )


class ModelParallelUnit:
    """The mesh as the `mpu` object that DeepSpeed expects, for runs without a pipeline."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard."""
        return self._mesh.dp_group

    def get_data_parallel_rank(self) -> int:
        """Rank in the data-parallel group."""
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        """Data-parallel size."""
        return self._mesh.dp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share each layer's columns."""
        return self._mesh.tp_group

    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Tensor-parallel size."""
        return self._mesh.tp_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
