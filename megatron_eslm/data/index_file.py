"""Megatron's `.idx` file read and checked before megatron-core maps it.

Layout: magic, version (u64), type code (u8), sequences S (u64), documents + 1 D (u64), lengths
int32 [S], byte offsets int64 [S], first sequence of each document int64 [D]; a file of several
modes adds int8 [S]. megatron-core asserts or dies of a bus error where these do not fit the `.bin`;
here every such case is an error that names the file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_eslm.errors import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
_DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


@dataclass(frozen=True)
class IndexFile:
    """What `prefix.idx` says, after it was found to agree with `prefix.bin`."""

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


def read_index(prefix: str) -> IndexFile:
    """Read `prefix.idx` and check it against itself and against the size of `prefix.bin`.

    Raises:
        ConfigError: a file is missing, cannot be read, is no Megatron file, is truncated, does not
            belong to the other, or there is no token in it.
    """
    for suffix, role in ((".bin", "token ids"), (".idx", "index")):
        path = f"{prefix}{suffix}"
        if not os.path.isfile(path):
            hint = ""
            if prefix.endswith((".bin", ".idx")):
                hint = f" Give the prefix without its ending: {prefix[:-4]}."
            raise ConfigError(
                f"--data-path {prefix}: there is no file {path} ({role}).{hint} "
                "tools/preprocess_data.py --output-prefix writes the pair."
            )
        if not os.access(path, os.R_OK):
            raise ConfigError(f"--data-path {prefix}: no permission to read {path}.")
    idx, bin_bytes = Path(f"{prefix}.idx"), os.path.getsize(f"{prefix}.bin")
    idx_bytes = idx.stat().st_size
    with idx.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC):
        raise ConfigError(
            f"--data-path {prefix}: {idx} is not a Megatron index (it does not begin with "
            "MMIDIDX). Write the pair with tools/preprocess_data.py."
        )
    if len(header) < _HEADER_BYTES:
        raise _damaged(prefix, f"{idx} ends inside its header")
    version, code, sequences, bounds = struct.unpack("<QBQQ", header[len(_MAGIC) :])
    if version != 1 or code not in _DTYPES:
        raise ConfigError(
            f"--data-path {prefix}: {idx} has index version {version} and type code {code}; only "
            f"version 1 with integer ids (codes {', '.join(map(str, _DTYPES))}) can be read."
        )
    expected = _HEADER_BYTES + 12 * sequences + 8 * bounds
    if idx_bytes not in (expected, expected + sequences):
        raise _damaged(prefix, f"{idx} has {idx_bytes} bytes, its header asks for {expected}")
    if sequences == 0 or bin_bytes == 0 or bounds == 0:
        raise ConfigError(
            f"--data-path {prefix}: the data set is empty ({sequences} sequences, {bin_bytes} "
            "bytes of ids). Preprocess an input that holds text."
        )
    lengths = np.memmap(idx, np.int32, "r", _HEADER_BYTES, (sequences,))
    offsets = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 4 * sequences, (sequences,))
    starts = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 12 * sequences, (bounds,))
    tokens, itemsize = int(lengths.sum(dtype=np.int64)), np.dtype(_DTYPES[code]).itemsize
    if (
        int(lengths.min()) < 0
        or int(offsets[0]) != 0
        or int(offsets[-1]) != (tokens - int(lengths[-1])) * itemsize
        or int(starts[0]) != 0
        or int(starts[-1]) != sequences
    ):
        raise _damaged(prefix, f"the tables in {idx} contradict each other")
    if bin_bytes != tokens * itemsize:
        state = "truncated" if bin_bytes < tokens * itemsize else "longer than its index says"
        raise _damaged(
            prefix,
            f"{prefix}.bin is {state}: it has {bin_bytes} bytes, {idx} describes "
            f"{tokens * itemsize} ({tokens} ids of {itemsize} bytes)",
        )
    if tokens == 0:
        raise ConfigError(f"--data-path {prefix}: the data set is empty (no token).")
    return IndexFile(prefix, _DTYPES[code], lengths, bounds - 1, tokens, bin_bytes, idx_bytes)


def check_tables(prefix: str) -> None:
    """Check every offset and document boundary of an index that `read_index` accepted.

    Raises:
        ConfigError: an offset is not where the lengths put it, or boundaries descend.
    """
    index = read_index(prefix)
    sequences, itemsize = len(index.lengths), np.dtype(index.dtype).itemsize
    idx = f"{prefix}.idx"
    offsets = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 4 * sequences, (sequences,))
    starts = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 12 * sequences, (index.documents + 1,))
    ends = np.cumsum(index.lengths, dtype=np.int64) * itemsize
    if sequences > 1 and not np.array_equal(offsets[1:], ends[:-1]):
        first = int(np.argmax(offsets[1:] != ends[:-1])) + 1
        raise _damaged(prefix, f"sequence {first} does not begin where the one before it ends")
    if index.documents and int(np.diff(starts).min()) < 0:
        raise _damaged(prefix, "document boundaries are not in order")


def _damaged(prefix: str, what: str) -> ConfigError:
    return ConfigError(
        f"--data-path {prefix} is damaged: {what}. Copy the files again or write them anew with "
        "tools/preprocess_data.py --overwrite."
    )
