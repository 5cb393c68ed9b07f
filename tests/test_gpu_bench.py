"""`make gpu` on a machine without a GPU: the script runs, and rows that fail are told apart."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.__main__ import GROUPS, SECOND_STAGE, main, measure
from benchmarks.gpu.process import WorkFailed, in_process
from benchmarks.gpu.row import Row, at_least, at_most, exactly, missed
from benchmarks.gpu.same_numbers import difference
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.training import Outcome
from benchmarks.gpu.waits import count_waits

ROOT = Path(__file__).parent.parent
Script = Callable[..., tuple[int, dict, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Script:
    """A function that calls the script with flags: exit code, JSON and output."""

    def call(*flags: str) -> tuple[int, dict, str]:
        file = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--json", str(file), *flags])
        code = main()
        return code, json.loads(file.read_text()), capsys.readouterr().out

    return call


def test_rows_that_need_no_gpu_hold_on_a_cpu(run: Script) -> None:
    names = [name for name in GROUPS if name != "jobs"]
    code, record, out = run("--only", *names)
    rows = record["rows"]
    assert code == 0, [row for row in rows if row["state"] == "MISSED"]
    assert {row["number"] for row in rows} == {n for name in names for n in GROUPS[name][0]}
    assert {row["number"] for row in rows if row["state"] == "not run"} == {8, 9}
    assert all(row["bound"] for row in rows if row["state"] == "ok")
    assert record["toy"] and record["date"] and set(record["seconds"]) == set(names)
    assert all(f"| {row['number']} | {row['what']} |" in out for row in rows)


@pytest.mark.slow  # each starts several jobs under torchrun
@pytest.mark.parametrize("flags", [("--only", "jobs"), ("--gpus", "2")], ids=["jobs", "ranks"])
def test_jobs_and_the_second_stage_hold_on_a_cpu(run: Script, flags: tuple[str, ...]) -> None:
    code, record, _ = run(*flags)
    rows = record["rows"]
    assert code == 0, [row for row in rows if row["state"] == "MISSED"]
    assert {row["number"] for row in rows} == ({12} if "jobs" in flags else {16, 17, 18})


def test_the_documentation_has_every_row_in_its_group() -> None:
    page = (ROOT / "docs" / "first-gpu-run.md").read_text()
    first, second = page.split("## The rows")[1].split("## When a row fails")[0].split("The second")
    found: dict[str, set[int]] = {name: set() for name in GROUPS}
    for number, group in re.findall(r"^\| (\d+) \| `(\w+)` \|", first, flags=re.MULTILINE):
        found[group].add(int(number))
    assert found == {name: set(numbers) for name, (numbers, _) in GROUPS.items()}
    numbers = {int(number) for number in re.findall(r"^\| (\d+) \|", second, flags=re.MULTILINE)}
    assert numbers == set(SECOND_STAGE["ranks"][0])


def test_bounds() -> None:
    assert at_most(1).holds(1) and not at_most(1).holds(1.1)
    assert at_least(1).holds(1) and not at_least(1).holds(0.9)
    assert exactly(0).holds(0) and not exactly(0).holds(1e-9)
    for bound in (at_most(1), at_least(1), exactly(1)):
        assert not bound.holds(float("nan"))
    rows = [
        Row.measured(1, "a", 2, at_most(1)),
        Row.measured(1, "b", True, exactly(1)),
        Row.measured(1, "c", 5),
        Row.failed(2, "d", "why"),
        Row.not_run(3, "e", "why"),
    ]
    assert [row.state for row in rows] == ["MISSED", "ok", "shown", "MISSED", "not run"]
    assert missed(rows) == [rows[0], rows[3]]
    assert json.dumps(Row.measured(1, "f", float("nan"), at_most(1)).to_dict(), allow_nan=False)


def _counts(then: str) -> Iterator[int]:
    yield 1
    if then == "raises":
        raise ValueError("no\nsecond line")
    if then == "crashes":
        os._exit(7)
    if then == "hangs":
        time.sleep(100)
    yield 2


@pytest.mark.parametrize(
    ("then", "why"),
    [("raises", "ValueError: no$"), ("crashes", "code 7"), ("hangs", "not done after 1 s")],
)
def test_what_was_measured_before_a_process_failed_is_kept(then: str, why: str) -> None:
    got = []
    with pytest.raises(WorkFailed, match=why):
        for value in in_process(_counts, then, seconds=1.0):
            got.append(value)
    assert got == [1]


def test_work_in_a_process_comes_to_its_end() -> None:
    assert list(in_process(_counts, "goes on", seconds=60.0)) == [1, 2]


def test_a_group_that_fails_does_not_hide_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def breaks(setup: Setup) -> Iterator[Row]:
        yield Row.measured(1, "before", 1.0)
        raise WorkFailed("it broke")

    def works(setup: Setup) -> Iterator[Row]:
        yield Row.measured(3, "after", 1.0, at_most(2.0))

    groups = {"first": ((1, 2), breaks), "second": ((3,), works)}
    found, seconds = measure(["first", "second"], Setup(True, False, tmp_path), groups)
    assert [(row.number, row.state) for row in found] == [(1, "shown"), (2, "MISSED"), (3, "ok")]
    assert "it broke" in found[1].note and set(seconds) == {"first", "second"}
    assert "| 2 | first |" in capsys.readouterr().out


def test_choices_near_a_threshold_may_differ_and_others_may_not() -> None:
    dump = {
        "instance_kept": np.array([True, True, False]),
        "instance_scores": np.array([3.0, 2.0, 1.0]),
        "tau_instance": np.array([2.0, 2.0, 2.0]),
        "token_kept": np.array([[True, False], [True, True], [False, False]]),
        "token_scores": np.array([[5.0, 4.0], [6.0, 5.00001], [np.nan, np.nan]]),
        "tau_token": np.array([5.0, 5.0, 5.0]),
    }
    one = Outcome([{"loss": 1.0}, {"loss": 2.0}], {1: dump, 2: dump})
    flipped = {**dump, "token_kept": dump["token_kept"] ^ np.array([[0, 0], [0, 1], [0, 0]], bool)}
    other = Outcome([{"loss": 1.5}, {"loss": 9.0}], {1: dump, 2: flipped})
    found = difference(one, other)
    assert (found.loss, found.flipped, found.far) == (0.5, 1, 0)
    assert found.choices == 2 * (3 + 6)
    far = {**dump, "token_kept": dump["token_kept"] ^ np.array([[0, 1], [0, 0], [0, 0]], bool)}
    assert difference(one, replace(other, dumps={1: dump, 2: far})).far == 1


def test_warnings_of_waits_are_counted_by_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    ((place, count),) = count_waits(caught).items()
    assert count == 2 and place.startswith("test_gpu_bench.py:")
