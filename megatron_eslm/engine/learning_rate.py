"""Learning rate schedule: linear warm-up and cosine decay, a function of the iteration alone."""

from __future__ import annotations

import math

from megatron_eslm.config.resolved import ResolvedOptimizer


def learning_rate(options: ResolvedOptimizer, iteration: int) -> float:
    """Learning rate of optimizer step `iteration` (from 0).

    The first step gets lr / warmup, step `lr_warmup_iters - 1` gets lr, and from `lr_decay_iters`
    on it is min_lr. A function of the iteration needs no state in checkpoints.
    """
    lr, min_lr = options.lr, options.min_lr
    warmup, decay = options.lr_warmup_iters, options.lr_decay_iters
    if iteration < warmup:
        return lr * (iteration + 1) / warmup
    if iteration >= decay:
        return min_lr
    progress = (iteration - warmup) / (decay - warmup)
    return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * progress))
