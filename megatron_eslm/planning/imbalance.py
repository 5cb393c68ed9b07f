"""How unequal ranks become when one threshold is taken over all of them.

Of N = ranks x rows scores the k largest are kept. If scores do not depend on the rank, the numbers
that the ranks keep are hypergeometric together, and a step waits for the largest of them.
"""

from __future__ import annotations

import functools
import math

import numpy as np


@functools.lru_cache(maxsize=4096)
def expected_largest(num_kept: int, rows: int, ranks: int) -> float:
    """Expected number that the rank keeping most keeps. Exact up to rounding.

    Ranks keep independent Binomial(rows, k / N) numbers, given that their sum is k. So P(largest <=
    m) is the coefficient of x^k in p_m(x)^ranks, p_m being the binomial's generating function cut
    off behind x^m, over the same coefficient without the cut; both are read off the discrete
    Fourier transform.

    Args:
        num_kept: k, 0 to ranks x rows.
        rows: scores of a rank.
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
    """Expected number of tokens in the loss on the rank that has most.

    What its rows alone give, exactly, and beyond that by simulation with a fixed seed: rows are
    dealt out as above, then tokens among those rows. Real tokens of a sequence resemble each other,
    so real ranks differ more.

    Args:
        num_kept: tokens that are kept, over all ranks.
        rows_kept: rows that are kept before, over all ranks.
        rows: rows of a rank.
        ranks: 1 or more.
        length: tokens of a row.
        draws: to average over.
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
