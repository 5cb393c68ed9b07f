"""Comparison tables, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.compare import (
    NO_CONTROL,
    common_target,
    compare,
    first_reach,
    lines_below,
    to_console,
    to_markdown,
)
from megatron_eslm.reports.runs import Run, read_run

from .conftest import line


def totals(share, iteration, seconds):
    """Running totals that grow with the iteration; `share` of the tokens is trained on."""
    return {
        "tokens": 1000 * iteration,
        "tokens_trained": int(1000 * share * iteration),
        "flops": 2e9 * share * iteration,
        "flops_paper": 3e9 * share * iteration,
        "elapsed_seconds": seconds * iteration,
        "step_seconds": seconds,
        "kept_instances": share,
        "kept_tokens": share,
        "nonfinite_steps": 0,
    }


@pytest.fixture
def two_runs(metrics_file):
    plain = metrics_file(
        "clm.jsonl",
        {"run": {"selection": "clm", "seed": 1, "score": None, "save": "here"}},
        line(100, 6.0, **totals(1.0, 100, 0.5)),
        line(200, 4.0, **totals(1.0, 200, 0.5)),
    )
    selective = metrics_file(
        "eslm.jsonl",
        {"run": {"selection": "eslm", "seed": 1, "score": "loss", "save": "there"}},
        line(100, 5.0, **totals(0.8, 100, 0.4)),
        line(200, 3.0, **{**totals(0.8, 200, 0.4), "nonfinite_steps": 2}),
    )
    return [read_run(plain), read_run(selective)]


def cells(comparison, name):
    row = next(row for row in comparison.rows if row.name == name)
    return [row.cell(column) for column in range(len(comparison.labels))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("final validation loss", ["4.0000", "3.0000 (-1.0000)"]),
        ("best validation loss", ["4.0000", "3.0000 (-1.0000)"]),
        ("iterations", ["200", "200 (1.00x)"]),
        ("tokens read", ["200,000", "200,000 (1.00x)"]),
        ("tokens trained on", ["200,000", "160,000 (0.80x)"]),
        ("FLOPs executed", ["4.000e+11", "3.200e+11 (0.80x)"]),
        ("FLOPs, paper's count", ["6.000e+11", "4.800e+11 (0.80x)"]),
        ("wall-clock seconds", ["100.0", "80.0 (0.80x)"]),
        ("mean step seconds", ["0.5", "0.4 (0.80x)"]),
        ("kept instances, mean", ["1.0000", "0.8000"]),
        ("kept tokens, mean", ["1.0000", "0.8000"]),
        ("skipped steps", ["0", "2 (+2)"]),
        # The target is 4.0: plain at 200, selective half way between 100 and 200.
        ("iterations to target", ["200.0", "150.0 (0.75x)"]),
        ("FLOPs executed to target", ["4.000e+11", "2.400e+11 (0.60x)"]),
        ("FLOPs, paper's count to target", ["6.000e+11", "3.600e+11 (0.60x)"]),
        ("wall-clock seconds to target", ["100.0", "60.0 (0.60x)"]),
    ],
)
def test_table_by_hand(two_runs, name, expected):
    comparison = compare(two_runs, ["plain", "eslm"])
    assert comparison.target == 4.0
    assert cells(comparison, name) == expected


def test_target_not_reached_is_said(two_runs):
    comparison = compare(two_runs, ["plain", "eslm"], target=3.5)
    assert cells(comparison, "iterations to target") == ["not reached", "175.0"]
    assert cells(comparison, "FLOPs executed to target") == ["not reached", "2.800e+11"]


def test_missing_quantities_are_not_available_rather_than_zero(metrics_file):
    runs = [read_run(metrics_file(n, line(10, 4.0))) for n in ("a.jsonl", "b.jsonl")]
    comparison = compare(runs, ["a", "b"])
    for name in ("tokens read", "mean step seconds", "FLOPs executed to target"):
        assert cells(comparison, name) == ["n/a", "n/a"]
    assert cells(comparison, "iterations to target") == ["10.0", "10.0 (1.00x)"]


def test_best_is_not_final(metrics_file):
    runs = [
        read_run(metrics_file("a.jsonl", line(1, 5.0), line(2, 2.0), line(3, 3.0))),
        read_run(metrics_file("b.jsonl", line(1, 5.0), line(2, 4.0), line(3, math.nan))),
    ]
    comparison = compare(runs, ["a", "b"])
    assert cells(comparison, "final validation loss") == ["3.0000", "nan"]
    assert cells(comparison, "best validation loss") == ["2.0000", "4.0000 (+2.0000)"]
    assert comparison.target == 3.0
    assert cells(comparison, "iterations to target") == ["1.7", "not reached"]


class TestFirstReach:
    @staticmethod
    def at(*pairs):
        return [line(i, loss, flops=10.0 * i) for i, loss in pairs]

    def test_between_two_evaluations(self):
        records = self.at((100, 6.0), (300, 5.0), (400, 3.0))
        assert first_reach(records, "iteration", 5.5) == pytest.approx(200.0)
        assert first_reach(records, "flops", 4.5) == pytest.approx(3250.0)

    def test_exactly_at_an_evaluation(self):
        records = self.at((100, 6.0), (300, 5.0))
        assert first_reach(records, "iteration", 5.0) == 300.0
        assert first_reach(records, "iteration", 6.0) == 100.0

    def test_at_the_first_evaluation_there_is_nothing_to_interpolate(self):
        assert first_reach(self.at((100, 2.0), (200, 1.0)), "iteration", 3.0) == 100.0

    def test_the_first_time_counts(self):
        records = self.at((100, 6.0), (200, 4.0), (300, 7.0), (400, 3.0))
        assert first_reach(records, "iteration", 5.0) == pytest.approx(150.0)

    def test_never(self):
        assert first_reach(self.at((100, 6.0)), "iteration", 5.0) is None
        assert first_reach([], "iteration", 5.0) is None

    def test_missing_quantity(self):
        assert first_reach(self.at((100, 6.0), (200, 4.0)), "mfu", 5.0) is None

    def test_not_a_number_is_no_end_of_a_line(self):
        records = self.at((100, math.nan), (200, 4.0))
        assert first_reach(records, "iteration", 5.0) == 200.0


def test_no_finite_loss(metrics_file):
    run = read_run(metrics_file("a.jsonl", line(1, math.nan)))
    with pytest.raises(ConfigError, match=r"give --target"):
        common_target([run, run])


def test_too_few_runs_labels_and_evaluations(two_runs, metrics_file):
    with pytest.raises(ConfigError, match="needs two or more"):
        compare(two_runs[:1], ["a"])
    with pytest.raises(ConfigError, match="--labels names 1 runs, but there are 2"):
        compare(two_runs, ["a"])
    blind = read_run(metrics_file("blind.jsonl", line(10), line(20)))
    with pytest.raises(ConfigError, match=r"blind\.jsonl has no valid_loss"):
        compare([two_runs[0], blind], ["a", "b"])


def test_control_is_asked_for(two_runs):
    assert NO_CONTROL in compare(two_runs, ["a", "b"]).notes
    control = Run(two_runs[0].path, {"selection": "random"}, two_runs[0].records)
    assert NO_CONTROL not in compare([*two_runs, control], ["a", "b", "c"]).notes


def test_settings_that_differ_are_named(two_runs):
    notes = compare(two_runs, ["a", "b"]).notes
    assert notes[0] == "settings that differ: selection = clm, eslm; score = -, loss"


def test_markdown(two_runs):
    comparison = compare(two_runs, ["plain", "a|b"])
    text = to_markdown(comparison)
    assert text.startswith("|  | plain | a\\|b |\n|---|---:|---:|\n")
    assert "| final validation loss | 4.0000 | 3.0000 (-1.0000) |\n" in text
    for below in lines_below(comparison):
        assert f"\n{below}\n" in text


def test_console_table(two_runs):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_console(compare(two_runs, ["plain", "[red]"])))
    text = console.export_text()
    assert "[red]" in text
    assert "3.200e+11 (0.80x)" in text
