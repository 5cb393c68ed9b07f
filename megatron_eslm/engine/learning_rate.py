"""Learning rate schedule: linear warm-up, then a decay, as a function of the iteration alone."""

from __future__ import annotations

import math

from megatron_eslm.config.resolved import ResolvedOptimizer
from megatron_eslm.config.training_options import DecayShape


def learning_rate(options: ResolvedOptimizer, iteration: int) -> float:
    """Learning rate of optimizer step `iteration` (from 0).

    The first step gets lr / warmup, step `lr_warmup_iters - 1` gets lr, and from `lr_decay_iters`
    on it is min_lr, unless it is constant. A function of the iteration needs no state in
    checkpoints.
    """
    lr, min_lr = options.lr, options.min_lr
    warmup, end = options.lr_warmup_iters, options.lr_decay_iters
    if iteration < warmup:
        return lr * (iteration + 1) / warmup
    style = options.lr_decay_style
    if style == "constant":
        return lr
    if iteration >= end:
        return min_lr
    if style == "WSD":
        shape, begin = options.lr_wsd_decay_style, end - options.lr_wsd_decay_iters
    else:
        shape, begin = style, warmup
    if iteration <= begin:
        return lr
    return min_lr + (lr - min_lr) * _remaining(shape, (iteration - begin) / (end - begin))


def _remaining(shape: DecayShape, progress: float) -> float:
    """What is left of lr - min_lr, from 1 to 0, at `progress` in (0, 1) through the decay.

    The shapes are those of Megatron-LM (core/optimizer_param_scheduler.py).
    """
    match shape:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "exponential":
            return 2.0 * 0.5**progress - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(progress)
