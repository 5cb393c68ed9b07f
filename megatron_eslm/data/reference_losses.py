"""Losses of a reference model, stored beside the tokens.

`PREFIX.reference-NAME.npy` is float16 [tokens of PREFIX.bin]: entry i is the loss, in nats, of
predicting token i from the tokens before it. So one file serves every mixture, seed, epoch and
split. `PREFIX.reference-NAME.json` records the data, the weights, the number of losses written and
their checksum. From it, a killed writer continues where it stopped and readers refuse incomplete
files.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from megatron_eslm.data.contents import fingerprint
from megatron_eslm.data.index_file import IndexFile, read_index
from megatron_eslm.data.meta import read_meta
from megatron_eslm.data.source import DataSource
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.checksum import crc32_of
from megatron_eslm.files.durable import write_whole
from megatron_eslm.files.lock import FileLock
from megatron_eslm.files.regular import open_regular
from megatron_eslm.files.schema import STRICT, Count, Size, read_as


@dataclass(frozen=True, kw_only=True)
class ReferenceMeta:
    """Metadata of one file of losses."""

    __pydantic_config__ = STRICT
    data: str
    """Fingerprint of the `.bin/.idx` pair."""
    weights: str
    """Fingerprint of the reference model's weights, or of what n-grams were counted from."""
    seq_length: Size | None
    """Maximum number of tokens predicted from one context; None for n-grams."""
    dtype: str
    """Compute dtype of the reference model."""
    split: str | None = None
    """--split whose training documents n-grams were counted from; None for models."""
    tokens: Count
    scored: Count = 0
    """Number of losses in the file, which is complete when this equals `tokens`."""
    crc32: Count | None = None
    """Checksum of these losses; None in files of older versions, which did not store it."""
    format_version: Literal[1] = 1

    def differences(self, other: ReferenceMeta) -> list[str]:
        """Describe the fields in which two files differ, progress aside."""
        return [
            f"{f.name}: {getattr(self, f.name)} there, {getattr(other, f.name)} here"
            for f in dataclasses.fields(self)
            if f.name not in ("scored", "crc32") and getattr(self, f.name) != getattr(other, f.name)
        ]


def losses_path(prefix: str, name: str) -> Path:
    """Path of the losses `name` of a pair."""
    return Path(f"{prefix}.reference-{name}.npy")


def data_fingerprint(index: IndexFile) -> str:
    """Fingerprint of one pair for ReferenceMeta."""
    return hashlib.sha256(fingerprint(index, read_meta(index.prefix)).encode()).hexdigest()


class ReferenceWriter:
    """Writes the losses of one pair from its first token to its last, across interruptions.

        with ReferenceWriter(prefix, name, meta) as writer:
            while writer.scored < meta.tokens:
                writer.append(losses)

    When `append` returns, its losses are on disk and counted.

    Raises:
        ConfigError: this name has other losses, another process writes them, or the disk fails.
    """

    def __init__(self, prefix: str, name: str, meta: ReferenceMeta, overwrite: bool = False):
        """
        Args:
            prefix: prefix of the pair.
            name: name of the losses.
            meta: metadata of the losses; `scored` is ignored.
            overwrite: start over, replacing existing losses.
        """
        self._path = losses_path(prefix, name)
        self._json = self._path.with_suffix(".json")
        with contextlib.ExitStack() as stack:
            try:
                self._lock = stack.enter_context(FileLock(self._path.with_suffix(".lock")))
                self._lock.take(f"--name {name}: {self._path}", "Wait, or choose another --name.")
                self._meta = self._begin(meta, overwrite)
                self._file = self._open()
            except OSError as error:
                raise _disk_error(self._path, error) from error
            stack.pop_all()  # success: keep the lock

    @property
    def scored(self) -> int:
        """Number of tokens scored so far."""
        return self._meta.scored

    def _begin(self, meta: ReferenceMeta, overwrite: bool) -> ReferenceMeta:
        """Return the metadata to continue from: the verified stored one, or a new one."""
        stored = None if overwrite else _read_meta(self._json)
        if stored is not None and (differences := stored.differences(meta)):
            raise ConfigError(
                f"{self._path} holds losses from another source ({'; '.join(differences)}). Choose "
                "another --name, or replace them with --overwrite."
            )
        if stored is not None and stored.scored:
            _check_losses(self._path, stored)
            return stored
        # Remove instead of truncating: a run may have the old file mapped.
        self._json.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        return dataclasses.replace(meta, scored=0, crc32=0)

    def _open(self) -> BinaryIO:
        file = self._path.open("r+b" if self._meta.scored else "w+b")
        header = {"descr": "<f2", "fortran_order": False, "shape": (self._meta.tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        # Drop losses that were written but not yet counted.
        file.truncate(file.tell() + 2 * self._meta.scored)
        file.seek(0, os.SEEK_END)
        self._write_meta()
        return file

    def append(self, losses: np.ndarray) -> None:
        """Add the losses, float32 [n], of the next n tokens."""
        if not np.isfinite(losses).all():
            raise ConfigError(
                f"The reference model gives losses that are not finite, at token {self.scored} of "
                f"{self._path} or soon after. Its weights cannot serve as a reference."
            )
        if self.scored + len(losses) > self._meta.tokens:
            raise ValueError(f"{self.scored} + {len(losses)} of {self._meta.tokens} losses")
        largest = np.finfo(np.float16).max
        try:
            data = np.minimum(losses, largest).astype("<f2").tobytes()
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
            crc = None if self._meta.crc32 is None else zlib.crc32(data, self._meta.crc32)
            self._meta = dataclasses.replace(
                self._meta, scored=self.scored + len(losses), crc32=crc
            )
            self._write_meta()
        except OSError as error:
            raise _disk_error(self._path, error) from error

    def _write_meta(self) -> None:
        text = json.dumps(dataclasses.asdict(self._meta), indent=1) + "\n"
        write_whole(self._json, text.encode())

    def __enter__(self) -> ReferenceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()


@dataclass(frozen=True, kw_only=True)
class ReferenceLosses:
    """The reference losses of all domains of a mixture."""

    name: str
    by_domain: tuple[np.ndarray, ...]
    """float16 [tokens of the domain], memory maps, in the order of the domains."""
    weights: str
    """Fingerprint of the reference model's weights, or of what n-grams were counted from."""
    seq_length: int | None
    split: str | None
    """--split whose training documents n-grams were counted from; None for models."""

    def of_sample(self, domain: int, part: Any, index: int) -> np.ndarray:
        """Read the losses of the labels of one sequence of a domain's GPTDataset, float32 [T]."""
        positions_S = positions_of(part, index)
        losses_T = self.by_domain[domain][np.maximum(positions_S[1:], 0)].astype(np.float32)
        return np.where(positions_S[1:] >= 0, losses_T, 0.0).astype(np.float32)


def open_reference_losses(source: DataSource, name: str) -> ReferenceLosses:
    """Open the stored losses `name` of all domains.

    Raises:
        ConfigError: losses of a domain are missing, incomplete, damaged or from another source.
    """
    opened = [_open_domain(domain.prefix, name) for domain in source.domains]
    metas = [meta for meta, _ in opened]
    for domain, meta in zip(source.domains, metas, strict=True):
        differing = [
            key
            for key in ("weights", "seq_length", "dtype", "split")
            if getattr(meta, key) != getattr(metas[0], key)
        ]
        if differing:
            raise ConfigError(
                f"--reference-losses {name}: {source.domains[0].prefix} and {domain.prefix} were "
                f"scored with different {' and '.join(differing)}, so their excess losses cannot "
                "be compared. Score them with the same reference model and settings."
            )
    return ReferenceLosses(
        name=name,
        by_domain=tuple(losses for _, losses in opened),
        weights=metas[0].weights,
        seq_length=metas[0].seq_length,
        split=metas[0].split,
    )


def _open_domain(prefix: str, name: str) -> tuple[ReferenceMeta, np.ndarray]:
    path, index = losses_path(prefix, name), read_index(prefix, trust=True)
    command = f"tools/score_reference.py --data-path {prefix} --name {name}"
    meta = _read_meta(path.with_suffix(".json"))
    if meta is None or not path.exists():
        raise ConfigError(
            f"--reference-losses {name}: {path} or its .json is missing. Score the text with "
            f"{command} --load and a reference model, or use --reference."
        )
    _check_text(path, meta, index)
    if meta.scored < meta.tokens:
        raise ConfigError(
            f"--reference-losses {name}: {path} has {meta.scored} of {meta.tokens} tokens. Run the "
            "same tools/score_reference.py command again; it continues from there."
        )
    return meta, _map_losses(path, meta)


def verify_losses(index: IndexFile) -> Iterator[str]:
    """Verify all losses beside a pair against its text and their checksums.

    Yields:
        The names of complete losses.

    Raises:
        ConfigError: losses are damaged or belong to other text.
    """
    folder, before = Path(index.prefix).parent, f"{Path(index.prefix).name}.reference-"
    for path in sorted(folder.iterdir()):
        if not (path.name.startswith(before) and path.name.endswith(".json")):
            continue
        meta = _read_meta(path)
        if meta is not None and meta.scored:
            _check_text(path.with_suffix(".npy"), meta, index)
            _check_losses(path.with_suffix(".npy"), meta)
            if meta.scored == meta.tokens:
                yield path.name.removeprefix(before).removesuffix(".json")


def _check_text(path: Path, meta: ReferenceMeta, index: IndexFile) -> None:
    """Raise ConfigError if the losses do not belong to this pair."""
    if meta.data != data_fingerprint(index) or meta.tokens != index.tokens:
        raise ConfigError(
            f"{path} was made from other text than {index.prefix}.bin. Score it again with "
            "tools/score_reference.py --overwrite."
        )


def _map_losses(path: Path, meta: ReferenceMeta) -> np.ndarray:
    """Memory-map the losses of a file; ConfigError if its dtype or length is wrong."""
    try:
        open_regular(path).close()
        losses = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise _damaged(path, str(error).removesuffix(".")) from error
    if losses.dtype != np.float16 or losses.shape != (meta.tokens,):
        raise _damaged(path, f"it holds {losses.dtype} {list(losses.shape)}")
    return losses


def _check_losses(path: Path, meta: ReferenceMeta) -> None:
    """Compare the counted losses with their checksum; ConfigError if they are damaged."""
    counted = 2 * meta.scored
    try:
        with open_regular(path) as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if shape != (meta.tokens,) or dtype != np.float16:
                raise _damaged(path, f"it holds {dtype} {list(shape)}")
            if os.fstat(file.fileno()).st_size - file.tell() < counted:
                raise _damaged(path, f"it ends before the {meta.scored} losses that are counted")
            if meta.crc32 is not None and crc32_of(file, counted) != meta.crc32:
                raise _damaged(path, "its contents have changed")
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} is damaged ({what}). Score the text again with tools/score_reference.py "
        "--overwrite."
    )


def _disk_error(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written: {error.strerror or error}. Free some space or get permission, "
        "and run the same command again; it keeps the losses already scored."
    )


def _read_meta(path: Path) -> ReferenceMeta | None:
    try:
        meta = read_as(ReferenceMeta, path)
        if meta.scored > meta.tokens:
            raise ConfigError(f"{path} counts {meta.scored} of {meta.tokens} losses.")
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise ConfigError(
            f"{error} Remove it and the .npy beside it, and score the text again."
        ) from error
    return meta


def positions_of(part: Any, index: int) -> np.ndarray:
    """Position in the `.bin` of each token of a sequence.

    Args:
        part: a megatron-core GPTDataset.
        index: number of the sequence in the data set.

    Returns:
        int64 [T+1]; -1 for padding.
    """
    # GPTDataset assembles a sequence from spans of documents. A copy that reads positions instead
    # of ids assembles the positions in the same way.
    twin = copy.copy(part)
    twin.dataset = _Positions(part.dataset)
    twin._pad_token_id = -1
    positions_S, _ = twin._query_document_sample_shuffle_indices(index)
    # Keep the index maps, which it builds on first use.
    for name in ("document_index", "sample_index", "shuffle_index"):
        setattr(part, name, getattr(twin, name))
    return positions_S


class _Positions:
    """An IndexedDataset that returns positions instead of ids."""

    def __init__(self, indexed: Any) -> None:
        self._index = indexed.index

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        pointer, document_length, _ = self._index[document]
        begin = pointer // np.dtype(self._index.dtype).itemsize + offset
        return np.arange(begin, begin + (document_length - offset if length is None else length))
