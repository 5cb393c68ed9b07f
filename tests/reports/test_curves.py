"""The picture."""

from __future__ import annotations

import math

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports import curves
from megatron_eslm.reports.runs import read_run

from .conftest import line


@pytest.fixture
def runs(metrics_file):
    return [
        read_run(
            metrics_file(
                f"{name}.jsonl",
                line(0, 9.0, flops=0, elapsed_seconds=0),
                *[
                    line(i, 3 + 9 / i, flops=cost * i * 1e13, elapsed_seconds=cost * i)
                    for i in range(5, 100, 5)
                ],
            )
        )
        for name, cost in (("a", 1.0), ("b", 0.8))
    ]


def test_writes_a_picture_that_is_always_the_same(runs, tmp_path):
    for name in ("one.png", "two.png"):
        curves.draw(runs, ["a", "b"], tmp_path / name, 3.2)
    picture = (tmp_path / "one.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert picture == (tmp_path / "two.png").read_bytes()


def test_runs_without_costs_are_still_drawn(metrics_file, tmp_path):
    run = read_run(metrics_file("a.jsonl", line(10, 4.0), line(20, 3.0)))
    curves.draw([run, run], ["a", "b"], tmp_path / "x.png", None)
    assert (tmp_path / "x.png").stat().st_size > 0


def test_place_that_cannot_be_written(runs, tmp_path):
    with pytest.raises(ConfigError, match="--output-prefix"):
        curves.draw(runs, ["a", "b"], tmp_path / "none" / "x.png", 3.2)


def test_points_leave_out_what_is_not_finite(metrics_file):
    run = read_run(
        metrics_file("a.jsonl", line(1, 4.0, flops=1), line(2, math.nan, flops=2), line(3, 3.0))
    )
    assert curves.points(run, "flops") == ([1.0], [4.0])


def test_ceiling_cuts_the_first_fall_of_long_runs_only(runs, metrics_file):
    # Iterations below a tenth of 95 do not count: the highest loss is the one at 10.
    highest, lowest = 3.9, 3 + 9 / 95
    assert curves.ceiling(runs) == pytest.approx(highest + 0.08 * (highest - lowest))
    short = read_run(metrics_file("s.jsonl", line(0, 9.0), line(10, 4.0)))
    assert curves.ceiling([*runs, short]) is None


@pytest.mark.parametrize(
    ("flops", "unit"), [(0.0, "FLOP"), (2e12, "TFLOP"), (3e15, "PFLOP"), (5e18, "EFLOP")]
)
def test_flops_unit(flops, unit):
    assert curves.flops_unit(flops)[1] == unit


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0.0, "seconds"), (599.0, "seconds"), (600.0, "minutes"), (1e5, "hours")]
)
def test_time_unit(seconds, unit):
    assert curves.time_unit(seconds)[1] == unit
