"""Expected largest shares against enumeration and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.planning.imbalance import expected_largest, expected_largest_tokens


def every_choice(num_kept: int, rows: int, ranks: int) -> np.ndarray:
    """[choices, ranks]: what each rank keeps, for every way to keep `num_kept` of all rows."""
    chosen = itertools.combinations(range(rows * ranks), num_kept)
    return np.array([np.bincount([i // rows for i in c], minlength=ranks) for c in chosen])


CASES = [(7, 4, 2), (1, 2, 3), (5, 3, 3), (10, 4, 3), (6, 8, 2), (3, 1, 6)]


@pytest.mark.parametrize("num_kept, rows, ranks", CASES)
def test_all_choices(num_kept: int, rows: int, ranks: int) -> None:
    kept = every_choice(num_kept, rows, ranks)
    assert expected_largest(num_kept, rows, ranks) == pytest.approx(kept.max(1).mean(), rel=1e-9)


@pytest.mark.parametrize("rows, ranks", [(4, 16), (8, 4), (12, 64), (5, 256)])
def test_simulated(rows: int, ranks: int) -> None:
    num_kept = num_to_keep(rows * ranks, 0.1)
    rng = np.random.default_rng(1)
    draws = rng.multivariate_hypergeometric([rows] * ranks, num_kept, 4000, method="marginals")
    largest = draws.max(axis=1)
    error = 5 * largest.std() / len(largest) ** 0.5 + 1e-9
    assert expected_largest(num_kept, rows, ranks) == pytest.approx(largest.mean(), abs=error)


def test_nothing_to_choose() -> None:
    assert expected_largest(24, 12, 2) == 12
    assert expected_largest(0, 12, 2) == 0
    assert expected_largest(9, 12, 1) == 9
    assert expected_largest_tokens(90, 1, 1, 1, 100) == 90


def test_tokens_follow_rows_and_lengths() -> None:
    """Rows make most of it; among equal rows, tokens alone differ by a few square roots."""
    rows_kept, rows, ranks, length = 108, 12, 10, 1000
    kept = num_to_keep(rows_kept * length, 0.1)
    found = expected_largest_tokens(kept, rows_kept, rows, ranks, length)
    by_rows = expected_largest(rows_kept, rows, ranks) * length * 0.9
    assert by_rows < found < 1.01 * by_rows
    all_rows = expected_largest_tokens(108_000, 120, rows, ranks, length)
    spread = (12_000 * 0.9 * 0.1) ** 0.5
    assert 10_800 + spread < all_rows < 10_800 + 3 * spread
    again = expected_largest_tokens.__wrapped__(kept, rows_kept, rows, ranks, length)
    assert found == again  # the seed is fixed
