"""The picture."""

from __future__ import annotations

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports import curves
from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import read_run
from megatron_eslm.reports.theme import DARK, LIGHT

from .conftest import line, totals


@pytest.fixture
def groups(long_runs):
    return [Group("both", long_runs), Group("a", long_runs[:1])]


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


def test_panels_that_only_some_comparisons_have(groups, metrics_file):
    run = read_run(
        metrics_file(
            "ada.jsonl",
            *[line(i, 4.0, alpha=a, **totals(1, i, 1)) for i, a in ((5, 0.1), (9, 0.2))],
        )
    )
    figure = curves.draw([*groups, Group("ada", [run])], 3.2)
    assert len(curves.draw(groups, 3.2).axes) == 6
    alpha = figure.axes[6]
    (drawn,) = alpha.get_lines()
    assert drawn.get_xydata().tolist() == [[5, 0.1], [9, 0.2]]
    # The same look as in the legend.
    assert drawn.get_color() == figure.axes[0].get_lines()[-1].get_color()
    assert (alpha.get_xlabel(), alpha.get_ylabel()) == ("iterations", "α")
    assert curves.svg(figure)


def test_twelve_methods_are_told_apart_by_any_two_of_colour_line_and_marker(long_runs):
    axes = curves.draw([Group(str(n), long_runs[:1]) for n in range(12)], None).axes[0]
    looks = [
        [
            (a.get_color(), a.get_linestyle()),
            (a.get_color(), a.get_marker()),
            (a.get_linestyle(), a.get_marker()),
        ]
        for a in axes.get_lines()
    ]
    assert all(len(set(pairs)) == 12 for pairs in zip(*looks, strict=True))
