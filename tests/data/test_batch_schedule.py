"""Batch sizes by consumed samples: Megatron-LM's ramp, its end, and ramps that cannot be."""

from __future__ import annotations

import logging

import pytest

from megatron_eslm.data.batch_schedule import BatchSchedule
from megatron_eslm.data.skipped_samples import SkippedSamples
from megatron_eslm.errors import ConfigError


@pytest.mark.parametrize(
    ("total", "ramp"), [(64, (16, 16, 300)), (64, (8, 4, 2800)), (20, (4, 16, 7)), (9, (1, 1, 8))]
)
def test_the_ramp_is_megatrons(total: int, ramp: tuple[int, int, int]) -> None:
    from megatron.core.num_microbatches_calculator import (
        RampupBatchsizeNumMicroBatchesCalculator,
    )

    logging.disable()
    theirs = RampupBatchsizeNumMicroBatchesCalculator(total, 1, 1, False, 1, *ramp)
    logging.disable(logging.NOTSET)
    ours = BatchSchedule(total, ramp)
    for position in range(ramp[2] + 20):
        theirs.update(position, consistency_check=True)
        assert ours(position) == theirs.current_global_batch_size, position


def test_increments_come_at_whole_samples() -> None:
    """Seven of them over 10^15 + 1 samples; floats would be wrong by many."""
    samples = 10**15 + 1
    schedule = BatchSchedule(8, (1, 1, samples))
    for n in range(1, 8):
        first = -(-samples * n // 7)
        assert (schedule(first - 1), schedule(first)) == (n, n + 1)


@pytest.mark.parametrize("ramp", [(), (4, 4, 40), (12, 4, 1000)])
@pytest.mark.parametrize("ranges", [(), ((5, 9), (30, 31), (44, 90))])
def test_the_end_is_that_of_all_steps(
    ramp: tuple[int, ...], ranges: tuple[tuple[int, int], ...]
) -> None:
    schedule, skipped = BatchSchedule(16, ramp), SkippedSamples(ranges)
    for begin in (0, 3, 50):
        position = begin
        for steps in range(12):
            assert schedule.end(begin, steps, skipped) == position
            position = skipped.after(position, schedule(position))
    for samples in (40, 10**14):  # not step by step, neither behind the ramp nor within it
        assert BatchSchedule(16, (4, 4, samples)).end(0, 10**15, skipped) > 10**15


@pytest.mark.parametrize(
    ("total", "ramp", "message"),
    [
        (20, (), r"--global-batch-size 20 is not a multiple of --micro-batch-size 4 x 2 "),
        (16, (16, 8, 9), r"starts at 16 sequences, but --global-batch-size 16 is not larger"),
        (64, (16, 20, 9), r"64 from 16 in increments of 20: it would come to 56 and then 76"),
        (32, (4, 4, 9), r"batches of 4 sequences, which is not a multiple of .* = 8\. Make START"),
        (32, (8, 12, 9), r"--rampup-batch-size 8 12 9 has batches of 20 sequences"),
    ],
)
def test_batches_that_cannot_be(total: int, ramp: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchSchedule(total, ramp).check(4, 2)
    BatchSchedule(64, (16, 16, 300)).check(4, 2)
