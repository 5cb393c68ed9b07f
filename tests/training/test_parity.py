"""Every layout trains the same model: see tests/training/parity.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from .parity import Case, all_cases, covering_cases, matrix, table


def check(data: list[str], folder: Path, cases: list[Case]) -> None:
    differences = matrix(data, folder, cases)
    print(table(differences))
    wrong = [
        f"{case} {method}: {difference}"
        for case, row in differences.items()
        for method, difference in row.items()
        if not difference.is_none
    ]
    assert not wrong, "\n".join(wrong)


def test_covering_layouts_train_the_same_model(data: list[str], tmp_path: Path) -> None:
    check(data, tmp_path, covering_cases())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_layouts_train_the_same_model(data: list[str], tmp_path: Path) -> None:
    check(data, tmp_path, all_cases())


def test_the_covering_layouts_cover() -> None:
    cases, everything = set(covering_cases()), set(all_cases())
    assert cases < everything
    for field in ("tp", "pp", "dp", "zero", "extra"):
        assert {getattr(c, field) for c in cases} == {getattr(c, field) for c in everything}
