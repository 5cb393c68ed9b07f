"""Who writes which tensors of a checkpoint: every parameter once, shared out over all ranks.

A tensor-parallel shard is written by the rank that holds it, anything else by tensor-parallel rank
0; a tied copy in another pipeline stage not at all. What the data-parallel replicas hold in common
is dealt out among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.shards import Shard, shards_of

if TYPE_CHECKING:
    from megatron_eslm.engine.engine import Engine


def deal(sizes: dict[str, int], num_ranks: int) -> dict[str, int]:
    """Give every name to a rank: the largest first, each to the rank that has least so far."""
    loads = [0] * num_ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def gather_share(
    engine: Engine, state: OptimizerState, vocab_size: int
) -> tuple[dict[str, Shard], dict[str, torch.Tensor]]:
    """What this rank writes. Collective over the data-parallel group.

    Holds one parameter beyond the share at a time.

    Returns:
        (shards by parameter name, tensors on the CPU by their name in the file); the tensors may be
        views of the state that training changes.
    """
    mesh, parameters = engine.mesh, dict(engine.model.named_parameters())
    written = {
        name: shard
        for name, shard in shards_of(engine.model, mesh, vocab_size).items()
        if (shard.dim is not None or mesh.tp_rank == 0)
        and not getattr(parameters[name], "ds_pipe_replicated", False)
        and shard.end > shard.begin  # not all of it padding
    }
    owners = deal({name: shard.numel for name, shard in written.items()}, mesh.dp_size)
    tensors = {}
    for name, shard in written.items():
        for kind in state.kinds(parameters[name]):
            flat = state.gather(parameters[name], kind, owners[name])
            if flat is not None:
                kept = flat.view(shard.shape).narrow(shard.axis, 0, shard.end - shard.begin)
                tensors[f"{kind}/{name}"] = kept.cpu().contiguous()
    mine = {name: shard for name, shard in written.items() if owners[name] == mesh.dp_rank}
    return mine, tensors
