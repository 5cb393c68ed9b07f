"""The part of each full parameter that a rank holds: all of it, or a tensor-parallel shard."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from megatron_eslm.model.architectures.base import PADDED
from megatron_eslm.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part of a parameter, cut along one dimension.

    The full parameter is the one in a checkpoint, without the padding rows of word embedding and
    head, whose number depends on the tensor-parallel size. So shards of these may extend beyond it.
    """

    full_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Shape of the part."""
    dim: int | None
    """Dimension sharded over tensor-parallel ranks; None if every rank holds all of it."""
    begin: int
    """Start of the part in that dimension."""

    @property
    def axis(self) -> int:
        """`dim`, or 0 if unsharded."""
        return self.dim or 0

    @property
    def numel(self) -> int:
        """Number of elements of the part, including padding."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """End of the part in `axis`, without padding; never less than `begin`."""
        axis = self.axis
        return max(self.begin, min(self.begin + self.shape[axis], self.full_shape[axis]))


def whole(shape: tuple[int, ...]) -> Shard:
    """The shard that is the full parameter."""
    return Shard(full_shape=shape, shape=shape, dim=None, begin=0)


def shards_of(model: nn.Module, mesh: Mesh, vocab_size: int) -> dict[str, Shard]:
    """Shards that this rank holds of all parameters of its model or pipeline stage.

    Args:
        model: parameters carry megatron-core's `tensor_model_parallel` and `partition_dim`; under
            ZeRO 3 they may be partitioned.
        mesh: this rank's position in the mesh.
        vocab_size: unpadded vocabulary size; later rows of embedding and head are padding.
    """
    shards = {}
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: ZeRO 3
        sharded = getattr(parameter, "tensor_model_parallel", False)
        dim: int | None = parameter.partition_dim if sharded else None  # type: ignore[attr-defined]
        full = list(shape)
        if dim is not None:
            full[dim] *= mesh.tp_size
        if name in PADDED:
            full[0] = vocab_size
        begin = 0 if dim is None else mesh.tp_rank * shape[dim]
        shards[name] = Shard(full_shape=tuple(full), shape=shape, dim=dim, begin=begin)
    return shards
