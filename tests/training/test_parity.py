"""Every layout trains the same model: see tests/training/parity.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from .parity import METHODS, Case, all_cases, covering_cases, covering_runs, matrix, table


def check(data: list[str], folder: Path, runs: dict[Case, list[str]]) -> None:
    differences = matrix(data, folder, runs)
    print(table(differences))
    wrong = [
        f"{case} {method}: {difference}"
        for case, row in differences.items()
        for method, difference in row.items()
        if not difference.is_none
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("world", sorted({case.world for case in covering_cases()} - {1}))
def test_covering_layouts_train_the_same_model(world: int, data: list[str], tmp_path: Path) -> None:
    runs = {case: methods for case, methods in covering_runs().items() if case.world == world}
    check(data, tmp_path, runs)


def test_llama_trains_the_same_model(data: list[str], tmp_path: Path) -> None:
    """Each way of dividing a model once; the whole matrix is in `make parity`."""
    cases = [Case(2, 1, 1, 0, ("--sequence-parallel",)), Case(1, 2, 1, 0), Case(1, 1, 2, 3)]
    cases += [Case(2, 2, 1, 1)]
    check(data, tmp_path, {case: ["eslm-llama"] for case in cases})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_layouts_train_the_same_model(data: list[str], tmp_path: Path) -> None:
    check(data, tmp_path, {case: list(METHODS) for case in all_cases()})


def test_the_covering_layouts_cover() -> None:
    cases, everything = set(covering_cases()), set(all_cases())
    assert cases < everything
    for field in ("tp", "pp", "dp", "zero", "extra"):
        assert {getattr(c, field) for c in cases} == {getattr(c, field) for c in everything}


def test_each_method_meets_each_size_and_zero_stage() -> None:
    """But two, of which the covering layouts have no third case."""
    runs, missing = covering_runs(), set()
    assert list(runs) == covering_cases()
    for method in set(METHODS) - {"eslm-llama"}:
        cases = [case for case, methods in runs.items() if method in methods]
        for field in ("tp", "pp", "dp", "zero"):
            sizes = {getattr(case, field) for case in all_cases()}
            sizes -= {getattr(case, field) for case in cases}
            missing |= {(method, field, size) for size in sizes}
    assert missing == {("clm", "zero", 2), ("random", "pp", 4)}
