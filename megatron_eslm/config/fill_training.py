"""Fill in batch, length and learning rate of a run from flags, JSON and preset."""

from __future__ import annotations

import logging

from megatron_eslm.config.fill_schedule import fill_schedule
from megatron_eslm.config.filler import Filler
from megatron_eslm.config.resolved import ResolvedOptimizer, ResolvedTraining, resolved
from megatron_eslm.config.training_options import OptimizerOptions, TrainingOptions
from megatron_eslm.data.batch_schedule import BatchSchedule
from megatron_eslm.data.skipped_samples import parse_ranges
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.presets import Preset

logger = logging.getLogger(__name__)


def fill_training(
    training: TrainingOptions,
    fill: Filler,
    preset: Preset | None,
    dp_size: int,
    accumulation_steps: int | None,
) -> ResolvedTraining:
    """Resolve batch sizes and lengths.

    Args:
        training: as given.
        fill: where values that are not given come from.
        preset: the recipe of --model-size or of the demo, if any.
        dp_size: data-parallel ranks.
        accumulation_steps: micro-steps per step in the DeepSpeed JSON, if any.

    Raises:
        ConfigError: a value is missing, or the batch does not divide.
    """
    micro = fill(training, "micro_batch_size")
    # The presets' 40 micro-steps are divided among the ranks, as in the paper's runs.
    default = micro * (preset.gradient_accumulation_steps if preset else dp_size)
    if accumulation_steps is not None:
        default = micro * accumulation_steps * dp_size
    total = fill(training, "global_batch_size", default)
    BatchSchedule(total, training.rampup_batch_size).check(micro, dp_size)
    parse_ranges(training.skip_samples)
    iters = fill(training, "train_iters", preset.lr_decay_iters if preset else None)
    return resolved(
        ResolvedTraining,
        training,
        micro_batch_size=micro,
        global_batch_size=total,
        train_iters=iters,
        eval_interval=fill(training, "eval_interval", min(1000, max(1, iters // 10))),
    )


def fill_optimizer(
    optimizer: OptimizerOptions, fill: Filler, training: ResolvedTraining
) -> ResolvedOptimizer:
    """Resolve the optimizer and the learning rate's schedule for the resolved length.

    Raises:
        ConfigError: a value is missing, or two contradict each other.
    """
    lr = fill(optimizer, "lr")
    min_lr = fill(optimizer, "min_lr", lr / 10)
    if "lr" in fill.given and "min_lr" not in fill.given and min_lr > lr:
        min_lr = lr / 10
    if min_lr > lr:
        raise ConfigError(f"--min-lr {min_lr:g} is above --lr {lr:g}.")
    schedule = fill_schedule(training.train_iters, optimizer, fill.preset)
    if "lr_wsd_decay_style" in fill.given and optimizer.lr_decay_style != "WSD":
        raise ConfigError(
            f"--lr-wsd-decay-style {optimizer.lr_wsd_decay_style} has no meaning with "
            f"--lr-decay-style {optimizer.lr_decay_style}; leave it out, or use --lr-decay-style "
            "WSD."
        )
    if schedule.warmup > training.train_iters:
        logger.warning(
            "--train-iters %d ends before the warm-up of --lr-warmup-iters %d: the learning rate "
            "never reaches --lr %g.",
            training.train_iters,
            schedule.warmup,
            lr,
        )
    return resolved(
        ResolvedOptimizer,
        optimizer,
        lr=lr,
        min_lr=min_lr,
        lr_warmup_iters=schedule.warmup,
        lr_decay_iters=schedule.decay,
        lr_wsd_decay_iters=schedule.wsd_decay,
        clip_grad=fill(optimizer, "clip_grad"),
    )
