"""Read a `.bin/.idx` pair from end to end and compare it with everything known about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_eslm.data.index_file import IndexFile, check_tables, read_index
from megatron_eslm.data.meta import DataMeta, read_meta
from megatron_eslm.data.source import check_ids, check_meta
from megatron_eslm.data.tokenizers import Tokenizer, load_tokenizer
from megatron_eslm.errors import ConfigError

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class VerifiedData:
    """A pair in which nothing is wrong."""

    prefix: str
    documents: int
    tokens: int
    dtype: str
    tokenizer: Tokenizer | None
    """None where no facts lie beside the pair: then ids and sums could not be compared."""
    sample: str
    """The first 200 characters."""


def verify_data(prefix: str) -> VerifiedData:
    """Check sizes, offsets, boundaries, checksums, ids and ends of documents of one pair.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    index = read_index(prefix)
    check_tables(prefix)
    meta = read_meta(prefix)
    tokenizer, sample = None, ""
    if meta is not None:
        check_meta(index, meta)
        for suffix, stored in ((".bin", meta.bin_sha256), (".idx", meta.idx_sha256)):
            if _sha256(Path(f"{prefix}{suffix}")) != stored:
                raise ConfigError(
                    f"{prefix}{suffix} is damaged: its checksum is not the one in "
                    f"{prefix}.meta.json. Copy it again or preprocess with --overwrite."
                )
        tokenizer = load_tokenizer(f"{prefix}.tokenizer")
        if tokenizer.identity != meta.tokenizer["identity"]:
            raise ConfigError(
                f"{prefix}.tokenizer is not the tokenizer that the data was made with; put the "
                "original folder back."
            )
        check_ids(index, tokenizer)
        _check_ends(index, meta, tokenizer)
        sample = tokenizer.decode(index.ids()[:1000].tolist())[:200]
    return VerifiedData(
        prefix=prefix,
        documents=index.documents,
        tokens=index.tokens,
        dtype=np.dtype(index.dtype).name,
        tokenizer=tokenizer,
        sample=sample,
    )


def _check_ends(index: IndexFile, meta: DataMeta, tokenizer: Tokenizer) -> None:
    """Data written with --append-eod has the end-of-document id last in each document."""
    if not meta.append_eod:
        return
    last = np.cumsum(index.lengths, dtype=np.int64) - 1
    wrong = np.flatnonzero(index.ids()[last] != tokenizer.eod)
    if len(wrong):
        raise ConfigError(
            f"{index.prefix}: document {int(wrong[0])} does not end in the end-of-document id "
            f"{tokenizer.eod}, though {index.prefix}.meta.json says that all do."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
