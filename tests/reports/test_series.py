"""Lines through the means of seeds, and the units of axes."""

from __future__ import annotations

import math

import pytest

from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import read_run
from megatron_eslm.reports.series import band, ceiling, flops_unit, time_unit

from .conftest import line


def test_band_over_the_iterations_that_all_seeds_have(metrics_file):
    runs = [
        read_run(metrics_file(f"{n}.jsonl", *lines))
        for n, lines in enumerate(
            (
                (line(10, 5.0, flops=1), line(20, 4.0, flops=2), line(30, 3.0, flops=3)),
                (line(10, 6.0, flops=3), line(20, math.nan, flops=4), line(30, 2.0, flops=5)),
            )
        )
    ]
    costs, spreads = band(Group("x", runs), "flops")
    assert costs == [2.0, 4.0]
    assert [(s.low, s.mean, s.high) for s in spreads] == [(5.0, 5.5, 6.0), (2.0, 2.5, 3.0)]


def test_ceiling_cuts_the_first_fall_of_long_runs_only(long_runs, metrics_file):
    # Iterations below a fifth of 95 do not count: the highest loss is the one at 20.
    highest, lowest = 3 + 9 / 20, 3 + 9 / 95
    assert ceiling(long_runs) == pytest.approx(highest + 0.08 * (highest - lowest))
    short = read_run(metrics_file("s.jsonl", line(0, 9.0), line(10, 4.0)))
    assert ceiling([*long_runs, short]) is None


@pytest.mark.parametrize(
    ("flops", "unit"), [(0.0, "FLOP"), (2e12, "TFLOP"), (3e15, "PFLOP"), (5e18, "EFLOP")]
)
def test_flops_unit(flops, unit):
    assert flops_unit(flops)[1] == unit


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0.0, "seconds"), (599.0, "seconds"), (600.0, "minutes"), (1e5, "hours")]
)
def test_time_unit(seconds, unit):
    assert time_unit(seconds)[1] == unit
