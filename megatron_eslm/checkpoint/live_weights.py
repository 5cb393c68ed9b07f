"""Full weights of the model that is being trained, on every rank, from any layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.shards import shards_of
from megatron_eslm.model.lora import adapter_names, is_adapter

if TYPE_CHECKING:
    from megatron_eslm.engine.engine import Engine


def live_weights(engine: Engine, vocab_size: int) -> dict[str, torch.Tensor]:
    """Gather the float32 master weights, as a checkpoint would hold them now. Collective.

    Each rank puts its shards into zeros, and one sum a parameter over all ranks makes the whole:
    tensor-parallel shards, pipeline stages and partitions of ZeRO alike. Summed as integers, each
    element arrives bit for bit.

    Args:
        engine: the training engine.
        vocab_size: unpadded vocabulary size; padding rows are left out.

    Returns:
        Full parameters by name, on the CPU; adapters are merged.
    """
    mesh, state = engine.mesh, OptimizerState(engine)
    parameters = dict(engine.model.named_parameters())
    shards = shards_of(engine.model, mesh, vocab_size)
    everywhere: list = [None] * mesh.world_size
    dist.all_gather_object(everywhere, {name: shard.full_shape for name, shard in shards.items()})
    shapes = {name: shape for own in everywhere for name, shape in own.items()}
    weights = {}
    for name in sorted(shapes):
        whole = torch.zeros(shapes[name], dtype=torch.float32, device=engine.device)
        if name in shards:
            shard = shards[name]
            flat = state.gather(parameters[name], "weight", owner=0)
            tied = getattr(parameters[name], "ds_pipe_replicated", False)
            first = mesh.tp_rank == 0 or shard.dim is not None
            if flat is not None and first and not tied and shard.end > shard.begin:
                part = flat.view(shard.shape).narrow(shard.axis, 0, shard.end - shard.begin)
                whole.narrow(shard.axis, shard.begin, part.shape[shard.axis]).copy_(part)
        dist.all_reduce(whole.view(torch.int32))
        weights[name] = whole.cpu()
    return _merged(weights, engine)


def _merged(weights: dict[str, torch.Tensor], engine: Engine) -> dict[str, torch.Tensor]:
    lora = engine.model.settings.lora
    if lora is None:
        return weights
    for name in weights:
        if name.endswith(".weight") and adapter_names(name)[0] in weights:
            lora_a, lora_b = (weights[part] for part in adapter_names(name))
            weights[name] += lora.scale * (lora_b @ lora_a)
    return {name: weight for name, weight in weights.items() if not is_adapter(name)}
