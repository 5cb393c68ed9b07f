"""Checks of a `.bin/.idx` pair against its metadata and its tokenizer."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from megatron_eslm.data.index_file import IndexFile
from megatron_eslm.data.meta import DataMeta
from megatron_eslm.data.tokenizers.base import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.checksum import sha256_of

_SCAN_IDS = 1 << 24
_SAMPLED_ENDS = 256


def check_meta(index: IndexFile, meta: DataMeta) -> None:
    """Compare the counts in the metadata with the pair.

    Raises:
        ConfigError: they differ.
    """
    for what, stored, found in (
        ("bytes in .bin", meta.bin_bytes, index.bin_bytes),
        ("bytes in .idx", meta.idx_bytes, index.idx_bytes),
        ("documents", meta.documents, index.documents),
        ("tokens", meta.tokens, index.tokens),
    ):
        if stored != found:
            raise ConfigError(
                f"{index.prefix}: {index.prefix}.meta.json says {stored} {what}, but "
                f"the files have {found}. They are not from one run; copy all of them again or "
                "preprocess with --overwrite."
            )


def check_sum(prefix: str, suffix: str, stored: str) -> None:
    """Compare the SHA-256 of `.bin` or `.idx` with the one stored beside them.

    Raises:
        ConfigError: they differ.
    """
    if sha256_of(f"{prefix}{suffix}") != stored:
        raise ConfigError(
            f"{prefix}{suffix} is damaged or from another run: its checksum differs from "
            f"{prefix}.meta.json. Copy the files again or preprocess with --overwrite."
        )


def check_ids(index: IndexFile, tokenizer: Tokenizer) -> int:
    """Read all ids once and compare them with the vocabulary.

    Returns:
        The largest id.

    Raises:
        ConfigError: names the file, the first id outside [0, vocab_size) and its position.
    """
    ids, largest = index.ids(), -1
    for begin in range(0, len(ids), _SCAN_IDS):
        part = ids[begin : begin + _SCAN_IDS]
        high = int(part.max())
        largest = max(largest, high)
        if high < tokenizer.vocab_size and int(part.min()) >= 0:
            continue
        where = int(np.argmax((part >= tokenizer.vocab_size) | (part < 0)))
        raise ConfigError(
            f"{index.prefix}.bin holds the id {int(part[where])} at position {begin + where}, "
            f"outside the vocabulary of {tokenizer.vocab_size} of the {tokenizer.name} in use. "
            "Name the tokenizer with which the data was made (--tokenizer-type and its files)."
        )
    return largest


def check_ends(index: IndexFile, meta: DataMeta, eod: int, *, every: bool) -> None:
    """Check that documents written with --append-eod end in the end-of-document id.

    They do not if the index belongs to the text of another run.

    Args:
        index: index of the pair.
        meta: metadata of the pair.
        eod: the tokenizer's end-of-document id.
        every: check all documents, instead of a few hundred spread over the file.

    Raises:
        ConfigError: names the first document with another ending.
    """
    if not meta.append_eod:
        return
    step = 1 if every else max(1, len(index.lengths) // _SAMPLED_ENDS)
    for first, last in index.last_ids(step):
        wrong = np.flatnonzero(last != eod)
        if len(wrong):
            raise ConfigError(
                f"{index.prefix}: document {first + int(wrong[0]) * step} does not end "
                f"in the end-of-document id {eod}, though {index.prefix}.meta.json says that all "
                "do. The files are damaged or not from one run; copy all of them again or "
                "preprocess with --overwrite."
            )


def fingerprint(index: IndexFile, meta: DataMeta | None) -> str:
    """Fingerprint of the contents of one pair."""
    if meta is not None:
        return json.dumps([meta.bin_sha256, meta.idx_sha256])
    # Without stored checksums, hash the full index and both ends of the ids; reading all of a
    # large .bin at every start would be too slow.
    digest = hashlib.sha256()
    with open(f"{index.prefix}.idx", "rb") as file:
        while block := file.read(_SCAN_IDS):
            digest.update(block)
    ids = index.ids()
    digest.update(ids[:_SCAN_IDS].tobytes())
    digest.update(ids[-_SCAN_IDS:].tobytes())
    return digest.hexdigest()
