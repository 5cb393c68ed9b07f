"""The DeepSpeed engine around the model."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_eslm.config.deepspeed_json import blamed_on
from megatron_eslm.config.resolved import ResolvedEngine, ResolvedOptimizer
from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.engine.float32_sums import Float32Sums
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import GPT
from megatron_eslm.ops.keep_rule import StepShape
from megatron_eslm.parallel.collectives import all_reduce_
from megatron_eslm.parallel.mesh import Mesh, ModelParallelUnit
from megatron_eslm.watchdog.phases import Phases

logger = logging.getLogger(__name__)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters: matrices with weight decay, biases and norms without."""
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    # Adapters are all matrices, and DeepSpeed refuses empty groups.
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, options: ResolvedOptimizer, *, cpu_offload: bool
) -> torch.optim.Optimizer:
    """Build AdamW: torch's fused one, or DeepSpeed's CPU Adam (compiled on first use)."""
    settings: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_eps,
    }
    groups = parameter_groups(model, options.weight_decay)
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        except Exception as error:
            raise ConfigError(
                "--cpu-offload needs DeepSpeed's CPU Adam, which is compiled on first use. "
                f"Compiling it failed: {error}. Install a C++ compiler and ninja (`python -m "
                "megatron_eslm.doctor` shows what is installed), or train without --cpu-offload."
            ) from error
    return torch.optim.AdamW(groups, fused=True, **settings)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine needs of a run."""

    optimizer: ResolvedOptimizer
    engine: ResolvedEngine
    dtype: torch.dtype
    deepspeed: dict[str, Any]
    """What deepspeed.initialize gets."""


class Engine:
    """Thin wrapper over DeepSpeedEngine; `engine.pipeline` wraps its pipeline engine.

    Attributes:
        ds: DeepSpeed's engine.
        model: this rank's GPT, or stage of it, with the canonical parameter names.
        plain_optimizer: float32 without ZeRO, where DeepSpeed uses a plain torch optimizer. It
            neither computes the gradient norm nor skips steps, and its clipping fails when a step
            is skipped. This class does all three instead.
        before_micro_step: called with each micro-batch before its training pass, with all weights
            gathered; for policies that need gradients first.
    """

    before_micro_step: Callable[[Batch], None] | None = None

    def __init__(self, settings: EngineSettings, model: GPT, mesh: Mesh, phases: Phases) -> None:
        import deepspeed
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        self.settings, self.model, self.mesh, self.phases = settings, model, mesh, phases
        self.plain_optimizer = settings.engine.zero_stage == 0 and settings.dtype == torch.float32
        module = self._module()
        # DeepSpeed's pipeline builds its own grid.
        mpu = ModelParallelUnit(mesh) if mesh.pp_size == 1 else None
        optimizer = build_optimizer(
            model, settings.optimizer, cpu_offload=settings.engine.cpu_offload
        )
        config = dict(settings.deepspeed)
        if self.plain_optimizer:
            config["gradient_clipping"] = 0.0
        # Some of DeepSpeed's optimizers print memory use while they are built.
        with contextlib.redirect_stdout(io.StringIO()), blamed_on(settings.engine.deepspeed_config):
            self.ds, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
            )
        if isinstance(self.ds.optimizer, BF16_Optimizer):
            Float32Sums(self.ds.optimizer)
        if mesh.dp_size == 1:
            self.ds.buffered_allreduce_fallback = _nothing_to_reduce

    def _module(self) -> nn.Module:
        """The module that DeepSpeed wraps."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return self.ds.device

    @property
    def monitor(self) -> Any:
        """DeepSpeed's monitors (TensorBoard, W&B, CSV)."""
        return self.ds.monitor

    def set_shape(self, shape: StepShape) -> None:
        """Set micro-steps and rows per micro-step of the next steps, the same on all ranks."""
        ds = self.ds
        if shape.micro_steps == ds.gradient_accumulation_steps():
            return
        # DeepSpeed assumes micro-batches of fixed size and needs only their number.
        rows = ds.train_micro_batch_size_per_gpu() * self.mesh.dp_size
        global_batch_size = shape.micro_steps * rows
        ds.set_train_batch_size(global_batch_size)
        # DeepSpeed finds the last micro-step of a step from the number of micro-steps so far.
        ds.micro_steps = 0
        ds.tput_timer.batch_size = global_batch_size

    def prepare_scores(self) -> None:
        """Send each stage the other stages' weights that `candidate_scores` needs. Collective."""

    @torch.no_grad()
    def candidate_scores(self, batch: Batch, rows: Rows) -> torch.Tensor:
        """Call EarlyExit.candidate_scores with gathered weights. Tensor-parallel collective.

        Args:
            batch: candidates, on the engine's device.
            rows: numbers of these rows among the step's rows.
        """
        with self.phases("proxy pass"):
            return self.model(*batch, candidates=rows)

    def step(self, batches: Iterable[Batch], lr: float) -> tuple[float, bool]:
        """Run one optimizer step over the micro-batches of this data-parallel rank.

        The model's recorder then holds the records of selection.

        Args:
            batches: as many as `set_shape` set (before that: gradient_accumulation_steps), on the
                engine's device; a pipeline's middle stages read none.
            lr: learning rate of this step.

        Returns:
            (norm of the gradient before clipping, whether the step was applied). A step with
            non-finite gradients is not applied on any rank and changes no state.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        return self._step(batches)

    def _step(self, batches: Iterable[Batch]) -> tuple[float, bool]:
        for batch in batches:
            if self.before_micro_step is not None:
                self.before_micro_step(batch)
            with self.phases("forward"):
                loss = self.ds(*batch)
            # backward() reduces gradients over data-parallel ranks.
            with self.phases("backward", waits=self.mesh.dp_size > 1):
                self.ds.backward(loss)
            if not self.ds.is_gradient_accumulation_boundary():
                self.ds.step()
        with self.phases("optimizer", waits=self.mesh.world_size > 1):
            norm = self._clip() if self.plain_optimizer else None
            self.ds.step()
        return self._outcome(norm)

    def _outcome(self, bare_norm: float | None) -> tuple[float, bool]:
        if bare_norm is not None:
            return bare_norm, math.isfinite(bare_norm)
        norm = float(self.ds.get_global_grad_norm() or math.nan)
        return norm, bool(self.ds.was_step_applied())

    def _clip(self) -> float:
        """Clip the gradients of a plain optimizer, or drop them if they are not finite."""
        with_gradient = [p for p in self.model.parameters() if p.grad is not None]
        norm = self._norm(with_gradient)
        if not math.isfinite(float(norm)):
            # An optimizer step over parameters without gradients changes nothing.
            self.ds.zero_grad()
        elif (limit := self.settings.optimizer.clip_grad) and float(norm) + 1e-6 > limit:
            # Below that, torch would multiply all gradients by 1.
            torch.nn.utils.clip_grads_with_norm_(with_gradient, limit, norm)
        return float(norm)

    def _norm(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Norm of the full gradient; replicated parameters count once."""
        mesh = self.mesh
        if mesh.tp_size == mesh.pp_size == 1:
            return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        own = [p for p in parameters if is_counted_here(p, mesh)]
        norm = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
        square = norm.double().square().reshape(1).to(self.device)
        all_reduce_(square, mesh.tp_group)
        all_reduce_(square, mesh.pp_group)
        return square.sqrt().float().squeeze(0)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], num_batches: int, num_rows: int) -> torch.Tensor:
        """Compute losses per sequence, without selection.

        Args:
            batches: `num_batches` batches of `num_rows` sequences, for this data-parallel rank; a
                pipeline's middle stages read none.
            num_batches: 1 or more.
            num_rows: the same for every batch.

        Returns:
            float64 [num_batches * num_rows, 2], in order: the sum of the losses of a sequence's
            valid tokens, and their number. Available on all stages of a pipeline.
        """
        self.ds.eval()
        sums = []
        try:
            for batch in batches:
                with self.phases("evaluation forward"):
                    sums.append(self.ds(*batch))
        finally:
            self.ds.train()
        return torch.cat(sums)


def _nothing_to_reduce(grads: Any = None, elements_per_buffer: int = 0) -> None:
    """Takes the place of DeepSpeed's reduction on the only data-parallel rank.

    DeepSpeed would copy all gradients into one buffer and back, and round those of bf16 runs, which
    are summed in float32, to bf16 on the way.
    """


def is_counted_here(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Whether this rank's copy of a parameter counts in norms.

    Shards always count; of parameters replicated on tensor-parallel ranks or on two pipeline
    stages, only the first copy does.
    """
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return getattr(parameter, "tensor_model_parallel", False) or mesh.tp_rank == 0
