"""Fill in warm-up and decay; defaults always fit the flags that are given."""

from __future__ import annotations

from typing import NamedTuple

from megatron_eslm.config.training_options import OptimizerOptions
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.presets import Preset

WARMUP_PART = 20
"""The default warm-up takes 1/WARMUP_PART of the steps."""

WSD_PART = 10
"""The default decay of WSD takes 1/WSD_PART of the steps."""


class Schedule(NamedTuple):
    """Steps of the learning rate's schedule."""

    warmup: int
    """Steps of the warm-up."""
    decay: int
    """Step at which the decay ends."""
    wsd_decay: int
    """Steps of the decay of WSD; 0 for other styles."""


def fill_schedule(train_iters: int, options: OptimizerOptions, preset: Preset | None) -> Schedule:
    """Resolve the schedule.

    Args:
        train_iters: steps of the run, 1 or more.
        options: as given.
        preset: its values are preferred over defaults, if they fit.

    Raises:
        ConfigError: flags contradict each other.
    """
    _check_style(options)
    is_wsd = options.lr_decay_style == "WSD"
    # The presets' decay ends long after the paper's runs, which would never leave WSD's plateau.
    decay_of_preset = None if preset is None or is_wsd else preset.lr_decay_iters
    warmup, decay = _warmup_and_decay(train_iters, options, preset, decay_of_preset)
    if not is_wsd:
        return Schedule(warmup, decay, 0)
    wsd = options.lr_wsd_decay_iters
    if wsd is None:
        return Schedule(warmup, decay, min(max(1, decay // WSD_PART), decay - warmup))
    if options.lr_warmup_iters is None:
        warmup = min(warmup, max(0, decay - wsd))
    if wsd > decay - warmup:
        raise ConfigError(
            f"--lr-wsd-decay-iters {wsd} is longer than the {decay - warmup} steps between warm-up "
            f"({warmup} steps) and end of the decay (step {decay}). Lower it, or change "
            "--lr-warmup-iters or --lr-decay-iters."
        )
    return Schedule(warmup, decay, wsd)


def _check_style(options: OptimizerOptions) -> None:
    style = options.lr_decay_style
    if options.lr_wsd_decay_iters is not None and style != "WSD":
        raise ConfigError(
            f"--lr-wsd-decay-iters {options.lr_wsd_decay_iters} has no meaning with "
            f"--lr-decay-style {style}; leave it out, or use --lr-decay-style WSD."
        )
    if options.lr_decay_iters is not None and style == "constant":
        raise ConfigError(
            f"--lr-decay-iters {options.lr_decay_iters} has no meaning with --lr-decay-style "
            "constant; leave it out, or use another --lr-decay-style."
        )


def _warmup_and_decay(
    train_iters: int,
    options: OptimizerOptions,
    preset: Preset | None,
    decay_of_preset: int | None,
) -> tuple[int, int]:
    warmup, decay = options.lr_warmup_iters, options.lr_decay_iters
    if warmup is not None and decay is not None:
        if warmup >= decay and warmup > 0:
            raise ConfigError(
                f"--lr-warmup-iters {warmup} must end before --lr-decay-iters {decay}; change one."
            )
        return warmup, decay
    by_preset = preset.lr_warmup_iters if preset is not None else None
    if decay is None:
        decay = train_iters if decay_of_preset is None else decay_of_preset
        if warmup:  # a given warm-up may be as long as the run, or longer than the preset's decay
            decay = max(decay, warmup + 1)
    if warmup is None:
        steps = min(train_iters, decay)
        warmup = max(1, steps // WARMUP_PART) if by_preset is None else by_preset
        if warmup >= decay:
            warmup = steps // WARMUP_PART
    return warmup, decay
