"""The short form of `make chaos`, and that its verdicts can be bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import PARTS, inject
from tests.chaos.outcome import Outcome, judge
from tests.chaos.table import Table, Verdict
from tests.chaos.warm import Ended


def test_damaged_files_and_full_disks(tmp_path: Path) -> None:
    table = Table()
    inject(table, tmp_path, parts=("files", "disk"), kills=0, scale=0.03, seed=7)
    assert table.good, table.text()
    assert sum(counts.total() for counts in table.counts.values()) > 100


def test_kills_in_a_save(tmp_path: Path) -> None:
    table = Table()
    inject(table, tmp_path, parts=("saves",), kills=0, scale=0.15, seed=7)
    assert table.good and table.counts["kills, in a save"][Verdict.SURVIVED] == 3, table.text()


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_all_of_it(tmp_path: Path) -> None:
    table = Table()
    inject(table, tmp_path, parts=PARTS, kills=102, scale=1.0, seed=1)
    assert table.good, table.text()


NOTHING = Outcome({}, {}, "", {})


@pytest.mark.parametrize(
    ("ended", "verdict"),
    [
        (Ended(2, "error: --load x is damaged.\n"), Verdict.REFUSED),
        (Ended(2, "nothing that begins as it should\n"), Verdict.LOST),
        (Ended(2, "error: a\nerror: b\n"), Verdict.LOST),
        (Ended(1, "error: x\n"), Verdict.LOST),
        (Ended(None, ""), Verdict.LOST),
        (Ended(-9, ""), Verdict.LOST),
        (Ended(0, "Traceback (most recent call last):\n"), Verdict.TRACEBACK),
    ],
)
def test_verdicts(ended: Ended, verdict: Verdict, tmp_path: Path) -> None:
    assert judge(ended, NOTHING, tmp_path / "m.jsonl", tmp_path)[0] is verdict


def test_every_difference_is_one() -> None:
    one = Outcome({1: {"loss": 2.0}}, {1: 3.0}, "a", {"iteration": 1})
    assert one.difference(one) is None
    for other in (
        Outcome({1: {"loss": 2.5}}, {1: 3.0}, "a", {"iteration": 1}),
        Outcome({}, {1: 3.0}, "a", {"iteration": 1}),
        Outcome({1: {"loss": 2.0}, 2: {}}, {1: 3.0}, "a", {"iteration": 1}),
        Outcome({1: {"loss": 2.0}}, {1: 3.5}, "a", {"iteration": 1}),
        Outcome({1: {"loss": 2.0}}, {1: 3.0}, "b", {"iteration": 1}),
        Outcome({1: {"loss": 2.0}}, {1: 3.0}, "a", {"iteration": 2}),
    ):
        assert one.difference(other) is not None


def test_a_table_with_a_bad_verdict_is_not_good() -> None:
    table = Table()
    table.add("a", Verdict.SURVIVED, times=3)
    table.add("a", Verdict.REFUSED)
    assert table.good and "| all | 4 | 3 | 1 | 0 | 0 | 0 |" in table.text()
    table.add("b", Verdict.SILENT, "the loss differs")
    assert not table.good and table.text().endswith("b: silent: the loss differs")
