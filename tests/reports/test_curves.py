"""The picture."""

from __future__ import annotations

import math

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports import curves
from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import read_run
from megatron_eslm.reports.theme import DARK, LIGHT

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


@pytest.fixture
def groups(runs):
    return [Group("both", runs), Group("a", runs[:1])]


def test_a_picture_is_always_the_same(groups, tmp_path):
    for name in ("one.png", "two.png"):
        curves.save(curves.draw(groups, 3.2), tmp_path / name)
    picture = (tmp_path / "one.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert picture == (tmp_path / "two.png").read_bytes()
    assert curves.svg(curves.draw(groups, 3.2)) == curves.svg(curves.draw(groups, 3.2))


def test_five_panels_and_a_legend(groups):
    axes = curves.draw(groups, 3.2).axes
    assert [a.get_xlabel() for a in axes[:5]] == [
        "iterations",
        "tokens trained on",
        "FLOPs executed (TFLOP)",
        "FLOPs, paper's count (FLOP)",
        "training time (seconds)",
    ]
    names = [text.get_text() for text in axes[5].get_legend().get_texts()]
    assert names == ["both (2 seeds)", "a (1 seed)"]
    # One band, that of the group of two; what was not measured says so.
    assert len(axes[0].collections) == 1
    assert [text.get_text() for text in axes[1].texts if "not" in text.get_text()]


def test_themes_differ(groups):
    assert DARK.ground in curves.svg(curves.draw(groups, None, DARK))
    assert DARK.ground not in curves.svg(curves.draw(groups, None, LIGHT))


def test_runs_without_costs_are_still_drawn(metrics_file, tmp_path):
    run = read_run(metrics_file("a.jsonl", line(10, 4.0), line(20, 3.0)))
    curves.save(curves.draw([Group("a", [run])], None), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_place_that_cannot_be_written(groups, tmp_path):
    with pytest.raises(ConfigError, match="--output-prefix"):
        curves.save(curves.draw(groups, 3.2), tmp_path / "none" / "x.png")


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
    costs, spreads = curves.band(Group("x", runs), "flops")
    assert costs == [2.0, 4.0]
    assert [(s.low, s.mean, s.high) for s in spreads] == [(5.0, 5.5, 6.0), (2.0, 2.5, 3.0)]


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
