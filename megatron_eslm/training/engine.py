"""The DeepSpeed engine around the model."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.training.options import OptimizerOptions

logger = logging.getLogger(__name__)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not."""
    named = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, options: OptimizerOptions, *, cpu_offload: bool
) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or DeepSpeed's for states in CPU memory (compiled on first use)."""
    assert options.lr is not None
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
                "--cpu-offload needs DeepSpeed's CPU Adam, which is compiled on first use, and "
                f"that failed: {error}. Install a C++ compiler and ninja (`python -m "
                "megatron_eslm.doctor` shows what is there), or train without --cpu-offload."
            ) from error
    return torch.optim.AdamW(groups, fused=True, **settings)


class Engine:
    """Thin wrapper over DeepSpeedEngine: one optimizer step is micro_step() x n, then update()."""

    def __init__(self, run: RunConfig, model: nn.Module) -> None:
        import deepspeed

        self.run = run
        optimizer = build_optimizer(model, run.optimizer, cpu_offload=run.engine.cpu_offload)
        # float32 without ZeRO is a bare optimizer: neither gradient norm nor skipping of steps, and
        # clipping that fails where a step is skipped. All three are done in update().
        self._bare = run.engine.zero_stage == 0 and run.dtype == torch.float32
        config = {**run.deepspeed, "gradient_clipping": 0.0} if self._bare else run.deepspeed
        self.ds, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.ds.device

    def micro_step(self, tokens_MS: torch.Tensor, valid_MT: torch.Tensor) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns this rank's term of the loss."""
        loss = self.ds(tokens_MS, valid_MT)
        self.ds.backward(loss)
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()
        return loss.detach()

    def update(self, lr: float) -> tuple[float, bool]:
        """Optimizer step at the end of the accumulation.

        Returns:
            (norm of the gradient before clipping, whether the step was applied). A step with
            gradients that are not finite is not applied on any rank and leaves all state alone.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self._bare:
            parameters = [p for p in self.ds.module.parameters() if p.grad is not None]
            total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            norm = float(total)
            if not math.isfinite(norm):
                # An optimizer step over parameters without gradients changes nothing.
                self.ds.zero_grad()
            elif self.run.optimizer.clip_grad:
                torch.nn.utils.clip_grads_with_norm_(
                    parameters, self.run.optimizer.clip_grad, total
                )
        self.ds.step()
        if norm is None:
            norm = float(self.ds.get_global_grad_norm() or math.nan)
            return norm, bool(self.ds.was_step_applied())
        return norm, math.isfinite(norm)

    @torch.no_grad()
    def evaluate(self, tokens_MS: torch.Tensor, valid_MT: torch.Tensor) -> torch.Tensor:
        """float64 [2] of this rank: sum of losses over valid tokens, and their number."""
        self.ds.eval()
        try:
            return self.ds(tokens_MS, valid_MT)
        finally:
            self.ds.train()
