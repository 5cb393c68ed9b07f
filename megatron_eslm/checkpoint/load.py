"""Load a checkpoint of any layout into a model or an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_eslm.checkpoint import tensor_files
from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.shards import shards_of
from megatron_eslm.checkpoint.tensor_files import KINDS
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.model.lora import is_adapter
from megatron_eslm.parallel.collectives import on_every_rank
from megatron_eslm.parallel.mesh import Mesh

if TYPE_CHECKING:
    from megatron_eslm.engine.engine import Engine


def load_model(model: torch.nn.Module, mesh: Mesh, found: CheckpointInfo) -> None:
    """Load this rank's part of the weights into a model or a pipeline stage. Collective.

    The model's adapters are left unchanged. Adapters of the checkpoint are merged into its weights.

    Args:
        model: a model not yet wrapped by an engine; any tensor-parallel size and dtype.
        mesh: this rank's position in the mesh.
        found: a checkpoint of either kind.

    Raises:
        ConfigError: a parameter is missing in the checkpoint or has another shape.
    """

    @torch.no_grad()
    def fill() -> None:
        reader = tensor_files.TensorReader(found.folder)
        shards = shards_of(model, mesh, found.shape.vocab_size)
        shards = {name: shard for name, shard in shards.items() if not is_adapter(name)}
        reader.check_holds(shards)
        parameters = dict(model.named_parameters())
        for name, shard in shards.items():
            parameter = parameters[name]
            parameter.copy_(reader.read("weight", name, shard).view(parameter.shape))

    on_every_rank(fill)


def load_engine(engine: Engine, found: CheckpointInfo, *, optimizer: bool = True) -> TrainState:
    """Restore weights, optimizer and loss scale; return the state. Collective over all ranks.

    Args:
        engine: a newly built engine.
        found: a training checkpoint.
        optimizer: also restore moments, step count and loss scale.

    Raises:
        ConfigError: a parameter is missing in the checkpoint or has another shape.
    """
    state = OptimizerState(engine)

    def restore() -> None:
        reader = tensor_files.TensorReader(found.folder, merged=False)
        shards = shards_of(engine.model, engine.mesh, found.shape.vocab_size)
        reader.check_holds(shards)
        for name, parameter in engine.model.named_parameters():
            for kind in state.kinds(parameter) if optimizer else KINDS[:1]:
                begin, end, part = state.part(parameter, kind)
                if begin < end:
                    part.copy_(reader.read(kind, name, shards[name], begin, end))
        if optimizer:
            state.set_scalars(reader.scalars)

    on_every_rank(restore)
    state.publish()
    train_state = found.state()
    # DeepSpeed's monitors use these counters.
    engine.ds.global_steps = train_state.iteration
    engine.ds.global_samples = train_state.consumed_samples
    return train_state
