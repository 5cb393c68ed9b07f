"""Assign the writing of a checkpoint's tensors to ranks, so that each is written once.

A tensor-parallel shard is written by the rank that holds it, and any other parameter by
tensor-parallel rank 0. A tied copy in another pipeline stage is not written. Data-parallel replicas
divide their common tensors among themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.shards import Shard, shards_of

if TYPE_CHECKING:
    from megatron_eslm.engine.engine import Engine


def deal(sizes: dict[str, int], num_ranks: int) -> dict[str, int]:
    """Assign names to ranks: largest first, each to the rank with the smallest load so far."""
    loads = [0] * num_ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def to_host(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor on the CPU, which may be a view of the given one."""
    return tensor.cpu().contiguous()


def gather_share(
    engine: Engine,
    state: OptimizerState,
    vocab_size: int,
    hold: Callable[[str, torch.Tensor], torch.Tensor] = to_host,
) -> tuple[dict[str, Shard], dict[str, torch.Tensor]]:
    """Gather the tensors that this rank writes. Collective over the data-parallel group.

    Memory holds at most one parameter besides the share.

    Args:
        engine: the training engine.
        state: its optimizer's state.
        vocab_size: unpadded vocabulary size.
        hold: brings a tensor (by its name in the file) to the CPU. By default the result may be a
            view of the state that training changes.

    Returns:
        (shards by parameter name, tensors on the CPU by their name in the file).
    """
    mesh, parameters = engine.mesh, dict(engine.model.named_parameters())
    written = {
        name: shard
        for name, shard in shards_of(engine.model, mesh, vocab_size).items()
        if (shard.dim is not None or mesh.tp_rank == 0)
        and not getattr(parameters[name], "ds_pipe_replicated", False)
        and shard.end > shard.begin  # skip pure padding
    }
    owners = deal({name: shard.numel for name, shard in written.items()}, mesh.dp_size)
    tensors = {}
    for name, shard in written.items():
        for kind in state.kinds(parameters[name]):
            flat = state.gather(parameters[name], kind, owners[name])
            if flat is not None:
                kept = flat.view(shard.shape).narrow(shard.axis, 0, shard.end - shard.begin)
                tensors[f"{kind}/{name}"] = hold(f"{kind}/{name}", kept)
    mine = {name: shard for name, shard in written.items() if owners[name] == mesh.dp_rank}
    return mine, tensors
