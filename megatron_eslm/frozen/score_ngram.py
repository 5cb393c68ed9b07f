"""Score `.bin` files once with n-grams counted from them, for `--reference-losses`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import psutil

from megatron_eslm.data.index_file import IndexFile, read_index
from megatron_eslm.data.plan import document_ranges
from megatron_eslm.data.reference_losses import ReferenceMeta, ReferenceWriter, data_fingerprint
from megatron_eslm.data.source import canonical_split
from megatron_eslm.errors import ConfigError
from megatron_eslm.frozen.ngram import NGramModel, Text

_CHUNK = 1 << 20
"""Tokens predicted and stored at a time."""

_BYTES_PER_TOKEN = 100
"""Memory of counting."""


class ScoredText(NamedTuple):
    """Result for one pair."""

    prefix: str
    tokens: int
    """Tokens scored in this call, without those scored earlier."""
    total_loss: float
    """Sum of the losses of these tokens, in nats."""
    held_out: int
    """Those of them that are not in the counts."""
    held_out_loss: float


def score_ngram(
    prefixes: Sequence[str],
    name: str,
    *,
    order: int,
    split: str,
    vocab_size: int,
    eod: int,
    overwrite: bool = False,
) -> list[ScoredText]:
    """Count n-grams over all pairs together and store the loss of each of their tokens.

    A token of the training documents is predicted by the counts of all others of these. Documents
    for validation and test are predicted, but not counted.

    Args:
        prefixes: prefixes of the pairs.
        name: name of the losses.
        order: 2 for bigrams, 3 for trigrams.
        split: shares of the documents, as --split of training.
        vocab_size: number of token ids.
        eod: the end-of-document id.
        overwrite: start over, replacing existing losses.

    Raises:
        ConfigError: a pair is unusable, no document is counted, this name has other losses, or
            memory is too small for the counts.
    """
    indices = [read_index(prefix) for prefix in prefixes]
    data = [data_fingerprint(index) for index in indices]
    source = f"{order}-grams {canonical_split(split)} {' '.join(sorted(data))}"
    metas = [
        ReferenceMeta(
            data=fingerprint,
            weights=hashlib.sha256(source.encode()).hexdigest(),
            seq_length=None,
            dtype="float64",
            split=canonical_split(split),
            tokens=index.tokens,
        )
        for index, fingerprint in zip(indices, data, strict=True)
    ]
    _check_memory(sum(index.tokens for index in indices))
    texts = [_text(index, split) for index in indices]
    if not any(text.counted_N.any() for text in texts):
        raise ConfigError(
            f"--split {split} leaves no training documents in {', '.join(prefixes)} to count "
            "n-grams of. Give training a larger share."
        )
    model = NGramModel(texts, order=order, vocab_size=vocab_size, eod=eod)
    results, first = [], 0
    for prefix, meta, text in zip(prefixes, metas, texts, strict=True):
        total_loss, held_out, held_out_loss = 0.0, 0, 0.0
        with ReferenceWriter(prefix, name, meta, overwrite) as writer:
            before = writer.scored
            while writer.scored < meta.tokens:
                begin, end = writer.scored, min(writer.scored + _CHUNK, meta.tokens)
                losses = model.losses(first + begin, first + end)
                total_loss += float(losses.sum())
                out = ~text.counted_N[begin:end]
                held_out += int(out.sum())
                held_out_loss += float(losses[out].sum())
                writer.append(losses.astype(np.float32))
        results.append(
            ScoredText(prefix, meta.tokens - before, total_loss, held_out, held_out_loss)
        )
        first += meta.tokens
    return results


def _check_memory(tokens: int) -> None:
    needed, free = tokens * _BYTES_PER_TOKEN, psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"Counting n-grams of {tokens:,} tokens takes some {needed / 2**30:.1f} GiB of memory, "
            f"and {free / 2**30:.1f} are free. Score fewer prefixes in a call, or give a model "
            "with --load."
        )


def _text(index: IndexFile, split: str) -> Text:
    ends = np.cumsum(index.lengths, dtype=np.int64)
    begins = ends - index.lengths
    starts_N, counted_N = (np.zeros(index.tokens, dtype=bool) for _ in range(2))
    starts_N[begins[index.lengths > 0]] = True
    first, last = document_ranges(split, len(ends))["train"]
    if last > first:
        counted_N[begins[first] : ends[last - 1]] = True
    return Text(index.ids(), starts_N, counted_N)
