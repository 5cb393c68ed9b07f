"""Fill in warm-up and decay; defaults always fit the flags that are given."""

from __future__ import annotations

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.presets import Preset

WARMUP_PART = 20
"""The default warm-up takes 1/WARMUP_PART of the steps."""


def fill_schedule(
    train_iters: int, warmup: int | None, decay: int | None, preset: Preset | None
) -> tuple[int, int]:
    """Steps of the warm-up, and the step at which the decay ends.

    Args:
        train_iters: steps of the run, 1 or more.
        warmup, decay: as given; None if not given.
        preset: its values are preferred over defaults, if they fit.

    Raises:
        ConfigError: both are given and the warm-up does not end before the decay.
    """
    if warmup is not None and decay is not None:
        if warmup >= decay and warmup > 0:
            raise ConfigError(
                f"--lr-warmup-iters {warmup} must end before --lr-decay-iters {decay}; change one."
            )
        return warmup, decay
    by_preset = preset.lr_warmup_iters if preset is not None else None
    if decay is None:
        decay = preset.lr_decay_iters if preset is not None else None
        decay = train_iters if decay is None else decay
        if warmup:  # a given warm-up may be as long as the run, or longer than the preset's decay
            decay = max(decay, warmup + 1)
    if warmup is None:
        steps = min(train_iters, decay)
        warmup = max(1, steps // WARMUP_PART) if by_preset is None else by_preset
        if warmup >= decay:
            warmup = steps // WARMUP_PART
    return warmup, decay
