"""Append Megatron `.bin/.idx` pairs to one another."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_eslm.data.contents import check_meta, check_sum
from megatron_eslm.data.index_file import IndexFile, read_index
from megatron_eslm.data.index_writer import write_index
from megatron_eslm.data.length_quantiles import length_quantiles
from megatron_eslm.data.meta import DataMeta, read_meta
from megatron_eslm.data.publish import publish_pair, refuse_existing
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.aside import aside_folder
from megatron_eslm.files.checksum import sha256_of
from megatron_eslm.files.lock import FileLock

_BLOCK_BYTES = 1 << 22


def merge_pairs(inputs: Sequence[str], prefix: Path, *, overwrite: bool = False) -> None:
    """Write the documents of all pairs, in order, as one pair.

    The output has metadata and a tokenizer if all inputs have; their checksums are compared.

    Args:
        inputs: prefixes.
        prefix: of the output.
        overwrite: replace an existing pair.

    Raises:
        ConfigError: an input is missing or damaged, inputs do not fit together, or the output
            exists. Nothing is changed.
        OSError: the pair cannot be written.
    """
    if str(prefix) in inputs:
        raise ConfigError(f"--output-prefix {prefix} is also an --input. Choose another.")
    indexes = [read_index(name) for name in inputs]
    metas = [read_meta(name) for name in inputs]
    _check_together(indexes, metas)
    for index, meta in zip(indexes, metas, strict=True):
        if meta is not None:
            check_meta(index, meta)
            check_sum(index.prefix, ".idx", meta.idx_sha256)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(prefix.with_name(f".{prefix.name}.building.lock")) as lock:
        lock.take(f"--output-prefix {prefix}", "Wait for it or choose another prefix.")
        refuse_existing(prefix, overwrite)
        with aside_folder(prefix) as folder:
            bin_sha256 = _append_ids(folder / "bin", indexes, metas)
            lengths = np.concatenate([index.lengths for index in indexes])
            write_index(folder / "idx", indexes[0].dtype, lengths, _starts(indexes))
            known = [meta for meta in metas if meta is not None]
            if known:
                shutil.copytree(f"{inputs[0]}.tokenizer", folder / "tokenizer")
                _meta(folder, known, lengths, bin_sha256).write(folder / "meta.json")
            publish_pair(folder, prefix)


def _check_together(indexes: list[IndexFile], metas: list[DataMeta | None]) -> None:
    first, first_meta = indexes[0], metas[0]
    for index, meta in zip(indexes[1:], metas[1:], strict=True):
        if index.dtype is not first.dtype:
            raise ConfigError(
                f"--input: {first.prefix} holds ids of type {np.dtype(first.dtype).name} and "
                f"{index.prefix} {np.dtype(index.dtype).name}. Preprocess them with one tokenizer."
            )
        if (meta is None) != (first_meta is None):
            without, other = (index, first) if meta is None else (first, index)
            raise ConfigError(
                f"--input: {without.prefix} has no .meta.json, but {other.prefix} has one. Merge "
                "pairs that all have one, or none."
            )
        if meta is None or first_meta is None:
            continue
        if meta.tokenizer["identity"] != first_meta.tokenizer["identity"]:
            raise ConfigError(
                f"--input: {first.prefix} and {index.prefix} were made with different tokenizers. "
                "Preprocess them with one."
            )
        if meta.append_eod != first_meta.append_eod:
            raise ConfigError(
                f"--input: only one of {first.prefix} and {index.prefix} was made with "
                "--append-eod. Preprocess both the same way."
            )


def _append_ids(path: Path, indexes: list[IndexFile], metas: list[DataMeta | None]) -> str:
    """Copy all ids; return their SHA-256. Sources are compared with their own on the way."""
    whole = hashlib.sha256()
    with path.open("wb") as out:
        for index, meta in zip(indexes, metas, strict=True):
            own = hashlib.sha256()
            with open(f"{index.prefix}.bin", "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    out.write(block)
                    whole.update(block)
                    own.update(block)
            if meta is not None and own.hexdigest() != meta.bin_sha256:
                raise ConfigError(
                    f"{index.prefix}.bin is damaged or from another run: its checksum differs "
                    f"from {index.prefix}.meta.json. Copy the files again or preprocess again."
                )
    return whole.hexdigest()


def _starts(indexes: list[IndexFile]) -> np.ndarray:
    """First sequence of each document, and the number of sequences last; int64."""
    parts, before = [np.zeros(1, np.int64)], 0
    for index in indexes:
        parts.append(index.starts()[1:] + before)
        before += len(index.lengths)
    return np.concatenate(parts)


def _meta(folder: Path, metas: list[DataMeta], lengths: np.ndarray, bin_sha256: str) -> DataMeta:
    return DataMeta(
        tokenizer=metas[0].tokenizer,
        documents=sum(meta.documents for meta in metas),
        tokens=sum(meta.tokens for meta in metas),
        max_token_id=max(meta.max_token_id for meta in metas),
        append_eod=metas[0].append_eod,
        sources=[source for meta in metas for source in meta.sources],
        bin_bytes=(folder / "bin").stat().st_size,
        bin_sha256=bin_sha256,
        idx_bytes=(folder / "idx").stat().st_size,
        idx_sha256=sha256_of(folder / "idx"),
        document_tokens=length_quantiles(lengths),
    )
