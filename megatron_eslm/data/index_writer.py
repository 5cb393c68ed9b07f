"""Write Megatron's `.idx` file from lengths, in pieces; the layout is in index_file.py.

megatron-core's builder keeps Python lists of all documents, some 100 bytes each, which is too much
for the half billion documents of SlimPajama.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_eslm.data.index_file import DTYPES, MAGIC

_CHUNK = 1 << 20


def write_index(
    path: Path, dtype: type[np.integer], lengths_S: np.ndarray, starts_D: np.ndarray | None = None
) -> None:
    """Write an index, byte for byte what megatron-core writes.

    Args:
        path: the file to write.
        dtype: type of the ids.
        lengths_S: int32, tokens of each sequence; may be a memory map.
        starts_D: int64, first sequence of each document, and the number of sequences last. None:
            each sequence is a document.
    """
    code = next(code for code, known in DTYPES.items() if known is dtype)
    sequences = len(lengths_S)
    bounds = sequences + 1 if starts_D is None else len(starts_D)
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, code, sequences, bounds))
        for part in _chunks(lengths_S):
            file.write(part.astype("<i4").tobytes())
        begin = 0
        for part in _chunks(lengths_S):
            ends = begin + np.cumsum(part, dtype=np.int64) * np.dtype(dtype).itemsize
            file.write((ends - part.astype(np.int64) * np.dtype(dtype).itemsize).tobytes())
            begin = int(ends[-1])
        if starts_D is not None:
            for part in _chunks(starts_D):
                file.write(part.astype("<i8").tobytes())
        else:
            for first in range(0, bounds, _CHUNK):
                file.write(np.arange(first, min(first + _CHUNK, bounds), dtype="<i8").tobytes())


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(array), _CHUNK):
        yield array[first : first + _CHUNK]
