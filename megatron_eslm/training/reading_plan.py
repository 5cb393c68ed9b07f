"""Plan which samples a run has left to read: begin, end, batch sizes, skipped ranges.

The position is `TrainState.consumed_samples` alone; it is never derived from a number of steps. So
batch size, micro-batch size and data-parallel size may change when a run continues.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.batch_schedule import BatchSchedule
from megatron_eslm.data.skipped_samples import SkippedSamples, join_skipped, parse_ranges
from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadingPlan:
    """Samples left to read when a run starts or continues."""

    begin: int
    """Current position: sample `begin` is next."""
    end: int
    """Position after the last step of the run; all samples it reads lie before."""
    batch_size: BatchSchedule
    skipped: SkippedSamples

    def samples_left(self, position: int) -> int:
        """Number of samples read from a position to the end."""
        return self.end - position - self.skipped.between(position, self.end)


def forget_ahead(recorded: list[Any], position: int) -> list[Any]:
    """Drop skipped ranges that are not reached yet, after the order of the data changed."""
    ahead = [part for part in recorded if part[1] > position]
    if ahead:
        logger.warning(
            "--skip-samples %s in the checkpoint refers to a different order of the data; these "
            "samples are no longer skipped",
            SkippedSamples.of(tuple((begin, end) for begin, end in ahead)),
        )
    return [part for part in recorded if part[1] <= position]


def plan_reading(run: RunConfig, state: TrainState, recorded: list[Any]) -> ReadingPlan:
    """Plan the samples of the remaining steps.

    Args:
        run: the run.
        state: state at which the run starts or continues.
        recorded: skipped ranges stored in the checkpoint, as pairs of sample numbers.

    Raises:
        ConfigError: --skip-samples names samples that were read before or are never reached.
    """
    t, position = run.training, state.consumed_samples
    given = parse_ranges(t.skip_samples)
    skipped = join_skipped(given, tuple((begin, end) for begin, end in recorded), position)
    schedule, steps = run.batch_schedule, max(0, t.train_iters - state.iteration)
    end = schedule.end(position, steps, skipped)
    for first, last in given:
        if first >= end:
            raise ConfigError(
                f"--skip-samples {first}:{last} begins after the end of the run: --train-iters "
                f"{t.train_iters} reads samples 0 to {end - 1}. Leave out the range, or raise "
                "--train-iters."
            )
    if steps and schedule(schedule.end(position, steps - 1, skipped)) < schedule.global_batch_size:
        logger.warning(
            "--train-iters %d ends before the ramp of --rampup-batch-size: the batch never reaches "
            "--global-batch-size %d.",
            t.train_iters,
            t.global_batch_size,
        )
    return ReadingPlan(begin=position, end=end, batch_size=schedule, skipped=skipped)
