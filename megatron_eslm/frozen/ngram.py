"""N-gram reference model: interpolated Kneser-Ney, a token's own occurrence left out.

Source: Kneser and Ney 1995 in the interpolated form of Chen and Goodman 1999, one discount per
order. An n-gram is a context, the n - 1 tokens before, and the token that follows. The highest
order counts occurrences; a lower one counts the different tokens that were seen in front:

    p_n(w | context) = (max(c - D, 0) + D * followers * p_(n-1)(w | shorter context)) / total

with c the count of the n-gram, total that of its context and followers the number of different
tokens that follow it. Below the unigrams all tokens are equally likely. A context that was never
seen leaves the next shorter one to decide.

Counts contain the tokens that they are to predict, so for each of these one occurrence is taken
off, at every order that it reaches. Otherwise an n-gram that occurs once would predict itself.

Shape legend: N tokens of all texts, G different n-grams of an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_DISCOUNT = (0.1, 0.9)
"""Limits of the discount, which a small text could put at 0 or 1. Then what was never seen, or only
once, would have probability 0."""


class Text(NamedTuple):
    """The tokens of one `.bin`."""

    ids_N: np.ndarray
    """Integers [N]."""
    starts_N: np.ndarray
    """bool, whether a document begins with the token."""
    counted_N: np.ndarray
    """bool, whether the token is in the counts; the others are only predicted."""


@dataclass(frozen=True)
class _Order:
    """Counts of one order."""

    ngram_N: np.ndarray
    """int32 or int64, the number of the n-gram that ends with each token."""
    context_N: np.ndarray
    """Integers, the number of its context."""
    counts_G: np.ndarray
    totals: np.ndarray
    """int32, by context, as `followers`."""
    followers: np.ndarray
    discount: float


class NGramModel:
    """Predicts the tokens of the texts that it was counted from.

    Memory is some 100 bytes a token while counting.
    """

    def __init__(self, texts: Sequence[Text], *, order: int, vocab_size: int, eod: int) -> None:
        """
        Args:
            texts: counted together; their tokens are numbered through in this order.
            order: 2 for bigrams, 3 for trigrams.
            vocab_size: number of token ids.
            eod: the id that stands before a document.
        """
        assert order in (2, 3), order
        self.vocab_size = vocab_size
        ids_N = np.concatenate([text.ids_N for text in texts]).astype(np.int64)
        starts_N = np.concatenate([text.starts_N for text in texts])
        counted_N = self._counted_N = np.concatenate([text.counted_N for text in texts])
        before_N = np.roll(ids_N, 1)
        before_N[starts_N] = eod
        bigram_N = _number(before_N * vocab_size + ids_N)
        highest = counted_N
        self._orders: list[_Order] = []  # from the highest
        if order == 3:
            # Each token's context is the bigram that ends before it. What precedes the end-of-
            # document id in front of a document is a context of its own.
            context_N = np.roll(bigram_N, 1)
            context_N[starts_N] = bigram_N.max(initial=0) + 1
            trigram_N = _number(context_N.astype(np.int64) * vocab_size + ids_N)
            self._orders.append(_count(trigram_N, context_N, highest))
            highest = _first_of_each(trigram_N, counted_N)
        self._orders.append(_count(bigram_N, before_N, highest))
        highest = _first_of_each(bigram_N, counted_N)
        self._orders.append(_count(ids_N, np.zeros(len(ids_N), np.int8), highest))

    def losses(self, begin: int, end: int) -> np.ndarray:
        """-log p in nats of tokens `begin` to `end`, float64; computed from the lowest order up."""
        part, below = slice(begin, end), 1.0 / self.vocab_size
        off_N = self._counted_N[part].astype(np.int64)
        terms = []
        for order in self._orders:
            count_N = order.counts_G[order.ngram_N[part]].astype(np.int64)
            context_N = order.context_N[part]
            # Where the occurrence that is taken off was the only one, the n-gram is gone: one
            # follower less, and one occurrence less for the next order.
            gone_N = off_N & (count_N == 1)
            followers_N = order.followers[context_N] - gone_N
            terms.append((count_N - off_N, order.totals[context_N] - off_N, followers_N, order))
            off_N = gone_N
        p_N = np.full(end - begin, below)
        for count_N, total_N, followers_N, order in reversed(terms):
            d = order.discount
            seen_N = np.maximum(count_N - d, 0.0) + d * followers_N * p_N
            p_N = np.where(total_N > 0, seen_N / np.maximum(total_N, 1), p_N)
        return -np.log(p_N)


def _number(keys_N: np.ndarray) -> np.ndarray:
    """Number keys from 0 in ascending order; equal keys alike."""
    order_N = np.argsort(keys_N)
    sorted_N = keys_N[order_N]
    new_N = np.empty(len(keys_N), dtype=bool)
    new_N[:1] = False
    np.not_equal(sorted_N[1:], sorted_N[:-1], out=new_N[1:])
    numbers_N = np.empty(len(keys_N), dtype=np.int32 if len(keys_N) < 2**31 - 1 else np.int64)
    numbers_N[order_N] = np.cumsum(new_N, dtype=numbers_N.dtype)
    return numbers_N


def _first_of_each(ngram_N: np.ndarray, counted_N: np.ndarray) -> np.ndarray:
    """bool [N], one counted token of each n-gram that has any."""
    places = np.flatnonzero(counted_N)
    one_G = np.full(int(ngram_N.max(initial=0)) + 1, -1, dtype=np.int64)
    one_G[ngram_N[places]] = places
    first_N = np.zeros(len(ngram_N), dtype=bool)
    first_N[one_G[one_G >= 0]] = True
    return first_N


def _count(ngram_N: np.ndarray, context_N: np.ndarray, counted_N: np.ndarray) -> _Order:
    size = int(context_N.max(initial=0)) + 1
    counts_G = np.bincount(ngram_N[counted_N], minlength=int(ngram_N.max(initial=0)) + 1)
    one_N = _first_of_each(ngram_N, counted_N)
    once, twice = int((counts_G == 1).sum()), int((counts_G == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.0
    return _Order(
        ngram_N=ngram_N,
        context_N=context_N,
        counts_G=counts_G.astype(np.int32),
        totals=np.bincount(context_N[counted_N], minlength=size).astype(np.int32),
        followers=np.bincount(context_N[one_N], minlength=size).astype(np.int32),
        discount=min(max(discount, _DISCOUNT[0]), _DISCOUNT[1]),
    )
