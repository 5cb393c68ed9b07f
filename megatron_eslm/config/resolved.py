"""Resolved options: all values are set. `resolve` builds them from the parsed options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_eslm.config.training_options import (
    EngineOptions,
    OptimizerOptions,
    TrainingOptions,
)
from megatron_eslm.model.architectures.names import ArchitectureName
from megatron_eslm.model.model_options import ModelOptions
from megatron_eslm.model.shape import RotaryScalingName


@dataclass(frozen=True, kw_only=True)
class ResolvedModel(ModelOptions):
    """Model options with all of the shape set."""

    architecture: ArchitectureName
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    rotary_base: float
    rotary_scaling: RotaryScalingName
    rotary_scaling_factor: float
    seq_length: int


@dataclass(frozen=True, kw_only=True)
class ResolvedTraining(TrainingOptions):
    """Training options with batch sizes and number of steps set."""

    train_iters: int
    micro_batch_size: int
    global_batch_size: int
    eval_interval: int


@dataclass(frozen=True, kw_only=True)
class ResolvedOptimizer(OptimizerOptions):
    """Optimizer options with the schedule set."""

    lr: float
    min_lr: float
    lr_warmup_iters: int
    lr_decay_iters: int
    lr_wsd_decay_iters: int


@dataclass(frozen=True, kw_only=True)
class ResolvedEngine(EngineOptions):
    """Engine options with the ZeRO stage set."""

    zero_stage: int


R = TypeVar("R", ResolvedModel, ResolvedTraining, ResolvedOptimizer, ResolvedEngine)


def resolved(cls: type[R], parsed: Any, **values: Any) -> R:
    """Build resolved options from parsed ones and these values.

    Args:
        cls: a subclass of the parsed options' class.
        parsed: the options.
        values: values of all fields that `cls` declares; none may be None.
    """
    given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}
    return cls(**{**given, **values})
