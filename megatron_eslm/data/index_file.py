"""Read and check Megatron's `.idx` file before megatron-core maps it.

Layout: magic, version (u64), type code (u8), sequences S (u64), documents + 1 D (u64), lengths
int32 [S], byte offsets int64 [S], first sequence of each document int64 [D]; multimodal files
add int8 [S]. If these do not fit the `.bin`, megatron-core fails an assertion, dies of a bus error
or reads wrong text; here every such case is an error that names the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_eslm.data.limits import check_documents
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.regular import open_regular

MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK = 1 << 20
"""Entries checked at a time, so that memory does not grow with the file."""


@dataclass(frozen=True)
class IndexFile:
    """Contents of `prefix.idx`, checked against `prefix.bin`."""

    prefix: str
    dtype: type[np.integer]
    lengths: np.ndarray
    """Tokens of each sequence, int32 [S]; a memory map."""
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int

    def ids(self) -> np.ndarray:
        """All token ids in file order, [tokens]; a memory map."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r", shape=(self.tokens,))

    def starts(self) -> np.ndarray:
        """First sequence of each document, then the number of sequences; int64 [documents + 1]."""
        offset = _HEADER_BYTES + 12 * len(self.lengths)
        return np.memmap(f"{self.prefix}.idx", np.int64, "r", offset, (self.documents + 1,))

    def last_ids(self, step: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the last id of every `step`-th sequence, in chunks of (first sequence, ids [n]).

        An empty sequence gives -1.
        """
        ids, begin = self.ids(), 0
        for first, lengths in _chunks(self.lengths):
            ends = begin + np.cumsum(lengths, dtype=np.int64)
            begin = int(ends[-1])
            part = slice(-first % step, None, step)
            last = np.where(lengths[part] > 0, ids[ends[part] - 1].astype(np.int64), -1)
            if len(last):
                yield first + -first % step, last


def read_index(prefix: str, *, trust: bool = False) -> IndexFile:
    """Read `prefix.idx` and check it against itself and against the size of `prefix.bin`.

    Args:
        prefix: path without suffix.
        trust: check header and sizes only, because another call in this run checked the entries.

    Raises:
        ConfigError: a file is missing, unreadable, not a Megatron file, truncated or empty, or the
            two do not belong together.
    """
    with _open(prefix, ".bin", "token ids") as file:
        bin_bytes = os.fstat(file.fileno()).st_size
    idx = Path(f"{prefix}.idx")
    with _open(prefix, ".idx", "index") as file:
        idx_bytes = os.fstat(file.fileno()).st_size
        header = file.read(_HEADER_BYTES)
    if not header.startswith(MAGIC):
        raise ConfigError(
            f"{prefix}: {idx} is not a Megatron index (it does not begin with "
            "MMIDIDX). Write the pair with tools/preprocess_data.py."
        )
    if len(header) < _HEADER_BYTES:
        raise _damaged(prefix, f"{idx} ends inside its header")
    version, code, sequences, bounds = struct.unpack("<QBQQ", header[len(MAGIC) :])
    if version != 1 or code not in DTYPES:
        raise ConfigError(
            f"{prefix}: {idx} has index version {version} and type code {code}; only "
            f"version 1 with integer ids (codes {', '.join(map(str, DTYPES))}) can be read."
        )
    expected = _HEADER_BYTES + 12 * sequences + 8 * bounds
    if idx_bytes not in (expected, expected + sequences):
        raise _damaged(prefix, f"{idx} has {idx_bytes} bytes, but its header implies {expected}")
    check_documents(prefix, sequences)
    if sequences == 0 or bin_bytes == 0 or bounds == 0:
        raise ConfigError(
            f"{prefix}: the data set is empty ({sequences} sequences, {bin_bytes} "
            "bytes of ids). Preprocess an input that holds text."
        )
    dtype = DTYPES[code]
    lengths = np.memmap(idx, np.int32, "r", _HEADER_BYTES, (sequences,))
    if not trust:
        offsets = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 4 * sequences, (sequences,))
        starts = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 12 * sequences, (bounds,))
        _check_lengths(prefix, lengths, bin_bytes, np.dtype(dtype).itemsize)
        _check_offsets(prefix, lengths, offsets, np.dtype(dtype).itemsize)
        _check_boundaries(prefix, starts, sequences)
    tokens = bin_bytes // np.dtype(dtype).itemsize
    return IndexFile(prefix, dtype, lengths, bounds - 1, tokens, bin_bytes, idx_bytes)


def _open(prefix: str, suffix: str, role: str) -> BinaryIO:
    try:
        return open_regular(f"{prefix}{suffix}")
    except FileNotFoundError as error:
        hint = ""
        if prefix.endswith((".bin", ".idx")):
            hint = f" Give the prefix without its suffix: {prefix[:-4]}."
        raise ConfigError(
            f"{prefix}: there is no file {prefix}{suffix} ({role}).{hint} "
            "tools/preprocess_data.py --output-prefix writes the pair."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{error} tools/preprocess_data.py writes pairs.") from error


def _check_lengths(prefix: str, lengths: np.ndarray, bin_bytes: int, itemsize: int) -> None:
    """Check that lengths are not negative and fill the `.bin`."""
    tokens = 0
    for first, part in _chunks(lengths):
        if int(part.min()) < 0:
            where = first + int(np.argmax(part < 0))
            raise _damaged(prefix, f"sequence {where} has {int(lengths[where])} tokens")
        tokens += int(part.sum(dtype=np.int64))
    if bin_bytes != tokens * itemsize:
        state = "truncated" if bin_bytes < tokens * itemsize else "longer than its index says"
        raise _damaged(
            prefix,
            f"{prefix}.bin is {state}: it has {bin_bytes} bytes, {prefix}.idx describes "
            f"{tokens * itemsize} ({tokens} ids of {itemsize} bytes)",
        )


def _check_offsets(prefix: str, lengths: np.ndarray, offsets: np.ndarray, itemsize: int) -> None:
    """Check that each sequence begins where the previous one ends."""
    begin = 0
    for first, part in _chunks(lengths):
        ends = begin + np.cumsum(part, dtype=np.int64) * itemsize
        found = offsets[first : first + len(part)]
        wrong = found != ends - part.astype(np.int64) * itemsize
        if wrong.any():
            where = first + int(np.argmax(wrong))
            raise _damaged(
                prefix,
                f"{prefix}.idx has sequence {where} at byte {int(offsets[where])}, which is not "
                "where the previous one ends",
            )
        begin = int(ends[-1])


def _check_boundaries(prefix: str, starts: np.ndarray, sequences: int) -> None:
    """Check that documents begin at sequence 0, are in order, and end with the last sequence."""
    before = 0
    for first, part in _chunks(starts):
        wrong = np.diff(part, prepend=before) < 0
        if first == 0:
            wrong[0] = part[0] != 0
        wrong |= part > sequences
        if wrong.any():
            where = first + int(np.argmax(wrong))
            raise _damaged(
                prefix,
                f"{prefix}.idx has document {where} begin at sequence {int(starts[where])} of "
                f"{sequences}, which is out of order",
            )
        before = int(part[-1])
    if before != sequences:
        raise _damaged(
            prefix, f"the documents in {prefix}.idx end at sequence {before} of {sequences}"
        )


def _chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, len(array), _CHUNK):
        yield first, array[first : first + _CHUNK]


def _damaged(prefix: str, what: str) -> ConfigError:
    return ConfigError(
        f"{prefix} is damaged: {what}. Copy the files again or rewrite them with "
        "tools/preprocess_data.py --overwrite."
    )
