"""Which samples a run has still to read: from where, how many a step, which not, to which end.

The position is `TrainState.consumed_samples` and nothing else: no number of steps is ever turned
into samples. So batch size, micro-batch size and data-parallel size may change where a run goes on.
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
    """What is left to read when a run starts or goes on."""

    begin: int
    """The position: sample `begin` is next."""
    end: int
    """The position behind the last step of the run; all that it ever reads lies before."""
    batch_size: BatchSchedule
    skipped: SkippedSamples

    def samples_left(self, position: int) -> int:
        """Samples that are read between a position and the end."""
        return self.end - position - self.skipped.between(position, self.end)


def forget_ahead(recorded: list[Any], position: int) -> list[Any]:
    """Skipped ranges of another order of the data, without those that are not reached yet."""
    ahead = [part for part in recorded if part[1] > position]
    if ahead:
        logger.warning(
            "--skip-samples %s of the checkpoint named samples of another order of the data: not "
            "skipped any more",
            SkippedSamples.of(tuple((begin, end) for begin, end in ahead)),
        )
    return [part for part in recorded if part[1] <= position]


def plan_reading(run: RunConfig, state: TrainState, recorded: list[Any]) -> ReadingPlan:
    """The samples of the steps that are left.

    Args:
        run: the run.
        state: where it starts or goes on.
        recorded: pairs of sample numbers, the skipped ranges that its checkpoint carries on.

    Raises:
        ConfigError: --skip-samples names samples that were read before, or that the run never
            comes to.
    """
    t, position = run.training, state.consumed_samples
    given = parse_ranges(t.skip_samples)
    skipped = join_skipped(given, tuple((begin, end) for begin, end in recorded), position)
    schedule, steps = run.batch_schedule, max(0, t.train_iters - state.iteration)
    end = schedule.end(position, steps, skipped)
    for first, last in given:
        if first >= end:
            raise ConfigError(
                f"--skip-samples {first}:{last} begins where the run has ended: its --train-iters "
                f"{t.train_iters} read samples 0 to {end - 1}. Leave it out, or raise "
                "--train-iters."
            )
    if steps and schedule(schedule.end(position, steps - 1, skipped)) < schedule.global_batch_size:
        logger.warning(
            "--train-iters %d ends before the ramp of --rampup-batch-size does: the batch never "
            "reaches --global-batch-size %d.",
            t.train_iters,
            t.global_batch_size,
        )
    return ReadingPlan(begin=position, end=end, batch_size=schedule, skipped=skipped)
