"""Checksums of files of any size."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_eslm.files.regular import open_regular

_BLOCK_BYTES = 2**22


def crc32_of(file: BinaryIO, count: int | None = None) -> int:
    """CRC-32 of the next `count` bytes of an open file; None means up to its end.

    Detects damage, not forgery.
    """
    crc = 0
    for block in _blocks(file, count):
        crc = zlib.crc32(block, crc)
    return crc


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a regular file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: BinaryIO, count: int | None = None) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES if count is None else min(count, _BLOCK_BYTES)):
        yield block
        if count is not None:
            count -= len(block)
