"""Every layout trains the same model: see tests/training/parity.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from .parity import METHODS, Case, all_cases, covering_cases, matrix, table


def check(data: list[str], folder: Path, cases: list[Case], methods=METHODS) -> None:
    differences = matrix(data, folder, cases, methods)
    print(table(differences))
    wrong = [
        f"{case} {method}: {difference}"
        for case, row in differences.items()
        for method, difference in row.items()
        if not difference.is_none
    ]
    assert not wrong, "\n".join(wrong)


def test_covering_layouts_train_the_same_model(data: list[str], tmp_path: Path) -> None:
    check(data, tmp_path, covering_cases(), [m for m in METHODS if m != "eslm-llama"])


def test_llama_trains_the_same_model(data: list[str], tmp_path: Path) -> None:
    """Each way of dividing a model once; the whole matrix is in `make parity`."""
    cases = [Case(2, 1, 1, 0, ("--sequence-parallel",)), Case(1, 2, 1, 0), Case(1, 1, 2, 3)]
    check(data, tmp_path, [*cases, Case(2, 2, 1, 1)], ["eslm-llama"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_layouts_train_the_same_model(data: list[str], tmp_path: Path) -> None:
    check(data, tmp_path, all_cases())


def test_the_covering_layouts_cover() -> None:
    cases, everything = set(covering_cases()), set(all_cases())
    assert cases < everything
    for field in ("tp", "pp", "dp", "zero", "extra"):
        assert {getattr(c, field) for c in cases} == {getattr(c, field) for c in everything}
