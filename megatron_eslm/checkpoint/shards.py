"""Which part of each full parameter a rank holds: all of it, or its tensor-parallel shard."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from megatron_eslm.model.init import WORD_EMBEDDING
from megatron_eslm.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a parameter, cut along one dimension.

    The full parameter is as a checkpoint has it: without the word embedding's padding rows, whose
    number depends on the tensor-parallel size. So the shards of the word embedding reach beyond it.
    """

    full_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the part."""
    dim: int | None
    """Dimension that is cut over tensor-parallel ranks; None where every rank holds all."""
    begin: int
    """Where in that dimension the part starts."""

    @property
    def axis(self) -> int:
        """`dim`, or 0 where nothing is cut."""
        return self.dim or 0

    @property
    def numel(self) -> int:
        """Elements of the part, padding included."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Where in `axis` the part that exists in the full parameter ends; never before `begin`."""
        axis = self.axis
        return max(self.begin, min(self.begin + self.shape[axis], self.full_shape[axis]))


def whole(shape: tuple[int, ...]) -> Shard:
    """All of a parameter."""
    return Shard(full_shape=shape, shape=shape, dim=None, begin=0)


def shards_of(model: nn.Module, mesh: Mesh, vocab_size: int) -> dict[str, Shard]:
    """The part that this rank holds of every parameter of its model (or pipeline stage).

    Args:
        model: parameters carry megatron-core's `tensor_model_parallel` and `partition_dim`; under
            ZeRO 3 they may be partitioned.
        mesh: this rank's place.
        vocab_size: ids that exist; the embedding's rows from there on are padding.
    """
    shards = {}
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: ZeRO 3
        sharded = getattr(parameter, "tensor_model_parallel", False)
        dim: int | None = parameter.partition_dim if sharded else None  # type: ignore[attr-defined]
        full = list(shape)
        if dim is not None:
            full[dim] *= mesh.tp_size
        if name == WORD_EMBEDDING:
            full[0] = vocab_size
        begin = 0 if dim is None else mesh.tp_rank * shape[dim]
        shards[name] = Shard(full_shape=tuple(full), shape=shape, dim=dim, begin=begin)
    return shards
