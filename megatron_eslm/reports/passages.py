"""Text to score: split documents into windows of token ids, and convert ids back to text."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np

from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.meta import read_meta
from megatron_eslm.data.plan import document_range
from megatron_eslm.data.tokenizers.build import Tokenizer, load_tokenizer, same_ids
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.regular import open_regular

END_OF_DOCUMENT = "⟨end⟩"
"""Text shown for the end-of-document id."""

_REPLACEMENT = "\ufffd"
_LONGEST_PIECE = 16


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens, predicted in one context."""

    name: str
    """Source of the tokens."""
    ids: np.ndarray
    """int64 [n], 1 <= n <= the window."""
    before: int
    """The id before the first token, from which it is predicted."""


def passages_of_text(text: str, name: str, tokenizer: Tokenizer, window: int) -> list[Passage]:
    """Split a text into windows of at most `window` tokens.

    Raises:
        ConfigError: the text is empty.
    """
    ids = np.asarray(tokenizer.encode(text), dtype=np.int64)
    if not len(ids):
        raise ConfigError(f"--text {name} is empty; give a file with some text.")
    return list(_windows(ids, name, tokenizer.eod, window))


def read_text(path: str) -> str:
    """Read a UTF-8 file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            return io.TextIOWrapper(file, encoding="utf-8").read()
    except ConfigError as error:
        raise ConfigError(f"--text: {error} Give a UTF-8 file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read: {error}. Give a UTF-8 file.") from error


def validation_passages(
    prefixes: Sequence[str],
    split: str | None,
    tokenizer: Tokenizer,
    window: int,
    samples: int,
    *,
    first_only: bool = False,
    eod_mask_loss: bool = False,
) -> list[Passage]:
    """Windows of the validation documents, taken from the `.bin/.idx` pairs in turn.

    Args:
        prefixes: prefixes of `.bin/.idx` pairs.
        split: shares that define the validation documents, as in training; None: all documents.
        tokenizer: the model's tokenizer.
        window: most tokens per passage.
        samples: number of passages to take; fewer if there are no more.
        first_only: take only the first window of each document, for variety.
        eod_mask_loss: skip each document's first token, which such training does not predict.

    Raises:
        ConfigError: a pair is unusable, was made with another tokenizer, or has no validation
            document; or `samples` is below 1.
    """
    if samples < 1:
        raise ConfigError(f"--samples {samples} must be 1 or more.")

    def of(prefix: str) -> Iterator[Passage]:
        index = read_index(prefix)
        _check_tokenizer(prefix, tokenizer)
        ids = index.ids()
        ends = np.cumsum(index.lengths, dtype=np.int64)
        first, last = document_range(split, "valid", len(index.lengths))
        if first == last:
            raise ConfigError(
                f"--split {split} leaves {prefix} no validation document ({len(ends)} in all). "
                "Give validation a larger share, as in 90,10,0."
            )
        for document in range(first, last):
            begin, end = int(ends[document]) - int(index.lengths[document]), int(ends[document])
            name = f"{Path(prefix).name}, document {document}"
            some = _windows(
                ids[begin:end].astype(np.int64), name, tokenizer.eod, window, int(eod_mask_loss)
            )
            yield from islice(some, 1 if first_only else None)

    in_turn = zip_longest(*map(of, prefixes))
    return list(islice((p for turn in in_turn for p in turn if p is not None), samples))


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int]]:
    """Split text by tokens: (text, number of tokens that spell it together).

    Byte-level tokens may hold parts of a character; such tokens are merged into one piece. The end
    of a document is END_OF_DOCUMENT.
    """
    found: list[tuple[str, int]] = []
    context: list[int] = []
    pending: list[int] = []

    def flush() -> None:
        if pending:
            # Decode with context, since some tokenizers drop a leading space.
            before, both = tokenizer.decode(context), tokenizer.decode(context + pending)
            text = both[len(before) :] if both.startswith(before) else tokenizer.decode(pending)
            found.append((text, len(pending)))
            context[:] = pending
            pending.clear()

    for number in map(int, ids):
        if number == tokenizer.eod:
            flush()
            context.clear()
            found.append((END_OF_DOCUMENT, 1))
            continue
        pending.append(number)
        cut_off = tokenizer.decode(context + pending).endswith(_REPLACEMENT)
        if not cut_off or len(pending) == _LONGEST_PIECE:
            flush()
    flush()
    return found


def _windows(
    ids: np.ndarray, name: str, eod: int, window: int, first: int = 0
) -> Iterator[Passage]:
    for begin in range(first, len(ids), window):
        part = ids[begin : begin + window]
        where = f"{name}, from token {begin}" if begin > first else name
        yield Passage(where, part, int(ids[begin - 1]) if begin else eod)


def _check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    meta = read_meta(prefix)
    if meta is not None and meta.tokenizer["identity"] != tokenizer.identity:
        theirs = load_tokenizer(f"{prefix}.tokenizer")
        if not same_ids(theirs, tokenizer):
            raise ConfigError(
                f"--data-path {prefix} was made with another tokenizer ({theirs.name}) than the "
                f"model's ({tokenizer.name}): the same text has other ids. Give data made with the "
                "model's tokenizer, or score plain text with --text."
            )
