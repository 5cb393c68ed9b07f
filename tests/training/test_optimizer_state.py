"""Where DeepSpeed keeps what the optimizer knows; whole runs are in test_crossing_layouts.py."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.tensor_index import LossScale, Scalars
from megatron_eslm.errors import ConfigError


def engine(optimizer: Any, *, plain: bool = False) -> Any:
    """As much of an Engine as OptimizerState looks at."""
    mesh = SimpleNamespace(dp_rank=0, dp_size=1, dp_group=None)
    ds = SimpleNamespace(optimizer=optimizer, device=torch.device("cpu"))
    return SimpleNamespace(mesh=mesh, ds=ds, plain_optimizer=plain)


def adamw(parameter: torch.Tensor) -> torch.optim.AdamW:
    return torch.optim.AdamW([parameter], lr=0.1, fused=True)


def test_state_before_the_first_step_is_what_adam_would_start_from() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)) for _ in range(2))
    optimizers = adamw(ours), adamw(theirs)
    state = OptimizerState(engine(optimizers[0], plain=True))
    assert state.scalars() == Scalars(0, None)
    for kind in ("exp_avg", "exp_avg_sq"):
        begin, end, part = state.part(ours, kind)
        assert (begin, end) == (0, 6) and not part.any()
    assert torch.equal(state.part(ours, "weight")[2], theirs.detach().view(-1))
    for _ in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = parameter.detach().cos()
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert state.scalars().adam_step == 3


def test_writing_a_part_writes_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = adamw(parameter)
    state = OptimizerState(engine(optimizer, plain=True))
    for value, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"), start=1):
        state.part(parameter, kind)[2].fill_(value)
    state.set_scalars(Scalars(41, None))
    held = optimizer.state[parameter]
    assert parameter.eq(1).all() and held["exp_avg"].eq(2).all() and held["exp_avg_sq"].eq(3).all()
    assert held["exp_avg"].shape == parameter.shape and held["step"] == 41
    assert state.scalars() == Scalars(41, None)


DYNAMIC = {
    "init_scale": 2.0**8,
    "scale_window": 4,
    "min_scale": 1.0,
    "delayed_shift": 2,
    "consecutive_hysteresis": False,
}


def zero(scale: float | None) -> Any:
    """One of DeepSpeed's ZeRO optimizers; without `scale` its loss scale is dynamic."""
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = adamw(torch.zeros(3, requires_grad=True))
    return SimpleNamespace(
        optimizer=optimizer,
        param_groups=optimizer.param_groups,
        bit16_groups=[[weight]],
        bit16_groups_flat=[weight.data],
        loss_scaler=CreateLossScaler(torch.float16, scale, scale is None, DYNAMIC),
    )


COUNTS = LossScale(cur_scale=128.0, cur_iter=4, last_overflow_iter=2, cur_hysteresis=1)


def test_the_state_of_the_loss_scaler_is_saved_and_restored() -> None:
    here, there = zero(None), zero(None)
    vars(here.loss_scaler).update(asdict(COUNTS))
    scalars = OptimizerState(engine(here)).scalars()
    assert scalars.loss_scale == COUNTS
    OptimizerState(engine(there)).set_scalars(scalars)
    assert vars(there.loss_scaler) == vars(here.loss_scaler)
    # A checkpoint without one (bf16, float32) leaves it as configured.
    OptimizerState(engine(there)).set_scalars(Scalars(1, None))
    assert vars(there.loss_scaler) == vars(here.loss_scaler)


def test_a_fixed_loss_scale_is_neither_saved_nor_replaced() -> None:
    fixed = zero(32.0)
    state = OptimizerState(engine(fixed))
    assert state.scalars().loss_scale is None
    state.set_scalars(Scalars(1, COUNTS))
    assert fixed.loss_scaler.cur_scale == 32.0


class AnotherOptimizer:
    """Of a kind that DeepSpeed may grow."""

    optimizer = None


def test_state_out_of_reach_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(AnotherOptimizer\) whose state cannot be saved"):
        OptimizerState(engine(AnotherOptimizer()))
