"""Pipeline parallelism: our stages in DeepSpeed's PipelineModule, under its 1F1B schedule.

Each stage is a GPT with its own blocks. Stages pass hidden states; labels are not sent, since the
first and the last stage read the same batches. Sequences are selected before a step
(training.step_selection), never inside the model.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megatron_eslm.data.batch import Batch
from megatron_eslm.engine.engine import Engine
from megatron_eslm.model.early_exit import refresh_copies
from megatron_eslm.model.gpt import GPT
from megatron_eslm.ops.keep_rule import StepShape
from megatron_eslm.parallel.mesh import Mesh


class _StageLayer(nn.Module):
    """A stage as the single layer of DeepSpeed's PipelineModule on this rank.

    On the last stage the layer includes the head and returns the loss. With a separate loss
    function, DeepSpeed's BF16_Optimizer would clear the head's gradients when the backward pass
    moves from the loss to the layers.
    """

    def __init__(self, stage: GPT) -> None:
        super().__init__()
        self.stage = stage
        self.batch: Batch | None = None
        """On the last stage: the batch with the labels of the current micro-step."""

    def forward(self, inputs: tuple[torch.Tensor, ...] | torch.Tensor) -> torch.Tensor:
        is_first = not isinstance(inputs, torch.Tensor)
        selected = self.stage.run(Batch(*inputs) if is_first else inputs, self.batch)  # type: ignore[arg-type]
        if not self.stage.is_last:
            return selected.hidden_LKD
        assert self.batch is not None
        batch, self.batch = self.batch, None
        return self.stage.loss(selected, batch)


class StagePipeline(PipelineModule):
    """PipelineModule whose layers are stages; their blocks were assigned before, by cost."""

    def __init__(self, stage: GPT, mesh: Mesh) -> None:
        self._ends_group = mesh.ends_group
        layer = _StageLayer(stage)
        # Hide DeepSpeed's plan; the log has ours, with costs.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                layers=[layer] * mesh.pp_size,
                topology=PipeModelDataParallelTopology(
                    num_pp=mesh.pp_size, num_mp=mesh.tp_size, num_dp=mesh.dp_size
                ),
                partition_method="uniform",
            )
        self.stage_layer = layer
        ends = mesh.is_first_stage or mesh.is_last_stage
        self._tied: list[Any] = [stage.embedding.weight] if ends and stage.shape.tied_head else []
        if mesh.is_last_stage:
            for weight in self._tied:
                # Only the first stage's copy counts in norms and checkpoints.
                weight.ds_pipe_replicated = True

    def _index_tied_modules(self) -> dict[str, Any]:
        # Both copies are initialized by name with the same values; nothing needs to be sent.
        return {}

    def get_tied_weights_and_groups(self) -> list[tuple[torch.Tensor, dist.ProcessGroup]]:
        """Tied weights and the groups of stages over which their gradients are summed."""
        return [(weight, self._ends_group) for weight in self._tied if weight.requires_grad]


# Phase of a rank during each instruction, and whether it waits for another stage in it.
_PHASES: dict[type, tuple[str, bool]] = {
    schedule.LoadMicroBatch: ("data", False),
    schedule.ForwardPass: ("stage {stage} forward", False),
    schedule.BackwardPass: ("stage {stage} backward", False),
    schedule.SendActivation: ("stage {stage} sends activations", True),
    schedule.RecvActivation: ("stage {stage} receives activations", True),
    schedule.SendGrad: ("stage {stage} sends gradients", True),
    schedule.RecvGrad: ("stage {stage} receives gradients", True),
    schedule.ReduceTiedGrads: ("reduction of tied gradients", True),
    schedule.ReduceGrads: ("reduction of gradients", True),
    schedule.OptimizerStep: ("optimizer", True),
}


class PipelinedEngine(Engine):
    """Engine over DeepSpeed's PipelineEngine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._plain_norm: float | None = None
        # Some of DeepSpeed's optimizers cast parameters but not buffers.
        self.model.copies.to(self.settings.dtype)
        self._rows = self.ds.train_micro_batch_size_per_gpu()
        # DeepSpeed's pipeline would write its own loss beside our metrics.
        self._monitor, self.ds.monitor = self.ds.monitor, _NoMonitor()
        self.ds._INSTRUCTION_MAP = {
            kind: self._announced(kind, execute)
            for kind, execute in self.ds._INSTRUCTION_MAP.items()
        }

    def _module(self) -> nn.Module:
        return StagePipeline(self.model, self.mesh)

    @property
    def monitor(self) -> Any:
        """DeepSpeed's monitors (TensorBoard, W&B, CSV)."""
        return self._monitor

    def _announced(self, kind: type, execute: Callable) -> Callable:
        """Wrap an instruction: announce its phase, and clip if the optimizer is a plain one."""
        name, waits = _PHASES[kind]
        if kind is schedule.ReduceTiedGrads:
            execute = _reduce_tied_gradients
        name = name.format(stage=self.mesh.pp_rank)
        clips = self.plain_optimizer and kind is schedule.OptimizerStep
        labels = self.mesh.is_last_stage and kind is schedule.ForwardPass

        def announced(engine: Any, **kwargs: Any) -> None:
            with self.phases(name, waits=waits):
                if clips:
                    self._plain_norm = self._clip()
                if labels:
                    batch = engine.pipe_buffers["labels"][kwargs["buffer_id"]]
                    engine.module.stage_layer.batch = Batch(*batch)
                execute(engine, **kwargs)

        return announced

    def prepare_scores(self) -> None:
        """Send the early exit's weights to all stages. Collective."""
        layers = self.model.early_exit.layers
        if layers is not None:
            with self.phases("early exit to all stages", waits=True):
                refresh_copies(layers, self.mesh.pp_group)

    def set_shape(self, shape: StepShape) -> None:
        super().set_shape(shape)
        self._set_rows(shape.rows)

    def _set_rows(self, rows: int) -> None:
        """Reset the stages' receive buffers if the number of rows changes."""
        if rows != self._rows:
            self.ds.reset_activation_shape()
            self._rows = rows

    def _step(self, batches: Iterable[Batch]) -> tuple[float, bool]:
        self.ds.train_batch(_twice(batches))
        return self._outcome(self._plain_norm)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], num_batches: int, num_rows: int) -> torch.Tensor:
        self._set_rows(num_rows)
        # DeepSpeed sums the outputs of the last stage, and ours do not have the shape of a loss.
        self.ds.total_loss = None
        sums = self.ds.eval_batch(
            _twice(batches), reduce_output=None, bcast_loss=False, num_micro_batches=num_batches
        )
        self.ds.module.train()
        rows = torch.empty(num_batches * num_rows, 2, dtype=torch.float64, device=self.device)
        if self.mesh.is_last_stage:
            torch.cat(sums, out=rows)
        with self.phases("validation loss to all stages", waits=True):
            source = dist.get_global_rank(self.mesh.pp_group, self.mesh.pp_size - 1)
            dist.broadcast(rows, source, group=self.mesh.pp_group)
        return rows


def _reduce_tied_gradients(engine: Any) -> None:
    """Sum the gradients of weights held by two stages, wherever the optimizer keeps them.

    DeepSpeed's own version reads `grad`, although ZeRO may have accumulated the gradients in
    float32 elsewhere; the two copies would then diverge.
    """
    for weight, group in engine.module.get_tied_weights_and_groups():
        if engine.using_bf16_optimizer:
            gradient = weight._hp_grad
        elif getattr(engine.optimizer, "use_grad_accum_attribute", False):
            gradient = weight.grad_accum
        else:
            gradient = weight.grad
        if gradient is not None:
            dist.all_reduce(gradient, group=group)


class _NoMonitor:
    enabled = False


def _twice(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Yield each batch twice: as the first stage's inputs and the last stage's labels."""
    for batch in batches:
        yield batch, batch
