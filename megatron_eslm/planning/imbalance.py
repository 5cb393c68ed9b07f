"""Imbalance between ranks under one global threshold.

The k largest of N = ranks x rows scores are kept. If scores do not depend on the rank, the numbers
kept per rank follow a multivariate hypergeometric distribution, and a step waits for the largest.
"""

from __future__ import annotations

import functools
import math

import numpy as np


@functools.lru_cache(maxsize=4096)
def expected_largest(num_kept: int, rows: int, ranks: int) -> float:
    """Expected maximum, over ranks, of the number of scores kept. Exact up to rounding.

    The numbers kept per rank are independent Binomial(rows, k / N), conditioned on the sum k. So
    P(largest <= m) is the coefficient of x^k in p_m(x)^ranks, where p_m is the binomial's
    generating function truncated after x^m, divided by the same coefficient without truncation.
    Both come from a discrete Fourier transform.

    Args:
        num_kept: k, 0 to ranks x rows.
        rows: scores per rank.
        ranks: 1 or more.
    """
    total = rows * ranks
    if num_kept in (0, total) or ranks == 1:
        return num_kept / ranks
    p = num_kept / total
    binomial = np.array(
        [math.comb(rows, j) * p**j * (1 - p) ** (rows - j) for j in range(rows + 1)]
    )
    points = np.exp(2j * np.pi * np.arange(total + 1) / (total + 1))
    turn_back = points ** (total + 1 - num_kept)

    def coefficient(largest: int) -> float:
        values = np.polynomial.polynomial.polyval(points, binomial[: largest + 1])
        return float((values**ranks * turn_back).mean().real)

    everything = coefficient(rows)
    expected = float(rows)
    for largest in range(rows - 1, math.ceil(num_kept / ranks) - 1, -1):
        at_most = coefficient(largest) / everything
        expected -= at_most
        if at_most < 1e-12:
            break
    return expected


@functools.lru_cache(maxsize=1024)
def expected_largest_tokens(
    num_kept: int,
    rows_kept: int,
    rows: int,
    ranks: int,
    length: int,
    *,
    draws: int = 64,
) -> float:
    """Expected maximum, over ranks, of the number of tokens in the loss.

    The contribution of rows is exact; the rest is simulated with a fixed seed: rows are drawn as
    above, then tokens among these rows. Real tokens of a sequence are correlated, so real ranks
    differ more.

    Args:
        num_kept: tokens kept, over all ranks.
        rows_kept: rows kept before, over all ranks.
        rows: rows per rank.
        ranks: 1 or more.
        length: tokens per row.
        draws: number of simulations to average over.
    """
    if ranks == 1:
        return float(num_kept)
    rng = np.random.default_rng(0)
    of_a_row = num_kept / rows_kept
    beyond = []
    for _ in range(draws):
        kept = rng.multivariate_hypergeometric([rows] * ranks, rows_kept, method="marginals")
        tokens = rng.multivariate_hypergeometric(kept * length, num_kept, method="marginals")
        beyond.append(tokens.max() - kept.max() * of_a_row)
    return expected_largest(rows_kept, rows, ranks) * of_a_row + float(np.mean(beyond))
