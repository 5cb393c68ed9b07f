"""Convert text to Megatron's `.bin/.idx` pairs, with tokenizer and metadata beside them.

    documents -> batches of about a megabyte -> tokenizer (in a pool of processes) -> builder

Documents keep the input order for any number of workers, so the output bytes are the same.
Everything is written into a staging folder and renamed at the end, the `.idx` last, so a killed run
leaves nothing that a reader would take for data.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_eslm.data.bad_lines import BadLines, OnBadLine
from megatron_eslm.data.encode_pool import MOST_WORKERS, Encoded, Encoder, encoding
from megatron_eslm.data.length_quantiles import length_quantiles
from megatron_eslm.data.megatron_imports import indexed_dataset
from megatron_eslm.data.meta import DataMeta
from megatron_eslm.data.publish import publish_pair, refuse_existing
from megatron_eslm.data.readers import read_documents
from megatron_eslm.data.tokenizers.base import Tokenizer
from megatron_eslm.data.tokenizers.samples import warn_of_changes
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.aside import aside_folder
from megatron_eslm.files.lock import FileLock
from megatron_eslm.files.output_prefix import output_prefix as parse_prefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreprocessReport:
    """Counts and duration of a preprocessing run."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int
    seconds: float
    empty_documents: int
    bad_documents: int
    """Documents left out by `on_bad_line="skip"`."""


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    append_eod: bool = True,
    text_key: str = "text",
    on_bad_line: OnBadLine = "fail",
    overwrite: bool = False,
    log_interval_seconds: float = 10.0,
    documents: Iterable[str] | None = None,
) -> PreprocessReport:
    """Tokenize `inputs` into `output_prefix.bin/.idx`, `.meta.json` and `.tokenizer/`.

    Args:
        inputs: inputs of `read_documents`; stored as the sources.
        output_prefix: path without suffix; its folder is created.
        tokenizer: the tokenizer, which is also stored.
        workers: tokenizing processes; 1 tokenizes in this process.
        append_eod: write the tokenizer's `eod` after each document.
        text_key: field or column that holds the text.
        on_bad_line: `fail` at an unreadable document, or `skip` and count it.
        overwrite: replace an existing pair.
        log_interval_seconds: interval of progress messages.
        documents: the documents; `inputs` then only names their sources.

    Raises:
        ConfigError: bad input, existing output, another process writing it, no documents, a full
            disk, or no permission. No partial output is left behind.
    """
    check_numbers(workers, log_interval_seconds)
    prefix = parse_prefix(output_prefix)
    if not append_eod:
        logger.warning(
            "%s: without --append-eod, nothing marks where a document ends and the next begins",
            prefix,
        )
    warn_of_changes(tokenizer)
    bad = BadLines(on_bad_line)
    texts = read_documents(inputs, text_key, bad) if documents is None else documents
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(prefix.with_name(f".{prefix.name}.building.lock")) as lock:
            lock.take(f"--output-prefix {prefix}", "Wait for it or choose another prefix.")
            refuse_existing(prefix, overwrite)
            with aside_folder(prefix) as folder:
                indexed_dataset()  # import now, so that its seconds do not count as tokenization
                totals = _Totals(prefix, log_interval_seconds)
                _write_pair(folder, list(inputs), texts, tokenizer, workers, append_eod, totals)
                refuse_existing(prefix, overwrite)  # not every writer takes the lock
                publish_pair(folder, prefix)
    except OSError as error:  # readers and tokenizers raise ConfigError instead
        raise ConfigError(
            f"--output-prefix {prefix} cannot be written: {error}. Free some space or choose "
            "another place."
        ) from error
    totals.log()
    if totals.empty or bad.count:
        logger.warning(
            "%s: left out %d documents without text and %d bad ones%s",
            prefix,
            totals.empty,
            bad.count,
            f" (the first: {bad.first})" if bad.count else "",
        )
    return PreprocessReport(
        prefix=str(prefix),
        documents=totals.documents,
        tokens=totals.tokens,
        text_bytes=totals.text_bytes,
        seconds=totals.seconds,
        empty_documents=totals.empty,
        bad_documents=bad.count,
    )


def check_numbers(workers: int, log_interval_seconds: float) -> None:
    """Raise ConfigError for numbers that no machine can use."""
    if workers < 1:
        raise ConfigError(f"--workers {workers} must be 1 or more.")
    if workers > MOST_WORKERS:
        raise ConfigError(
            f"--workers {workers} is more than {MOST_WORKERS}; use one per processor core "
            f"({os.cpu_count()} here)."
        )
    if log_interval_seconds < 0:
        raise ConfigError(f"--log-interval {log_interval_seconds:g} must be 0 seconds or more.")


class _Totals:
    """Sums over all batches, logged periodically."""

    def __init__(self, prefix: Path, log_interval_seconds: float) -> None:
        self.documents = self.tokens = self.text_bytes = self.empty = 0
        self.max_id = -1
        self.bin_sha256 = hashlib.sha256()
        self._prefix, self._interval_seconds = prefix, log_interval_seconds
        self._start = self._last_log = time.monotonic()
        self.seconds = 0.0

    def add(self, batch: Encoded) -> None:
        self.bin_sha256.update(batch.ids.data)
        self.documents += len(batch.lengths)
        self.tokens += len(batch.ids)
        self.text_bytes += batch.text_bytes
        self.empty += len(batch.empty)
        self.max_id = max(self.max_id, batch.max_id)
        now = time.monotonic()
        self.seconds = max(now - self._start, 1e-9)
        if now - self._last_log >= self._interval_seconds:
            self._last_log = now
            self.log()

    def log(self) -> None:
        logger.info(
            "%s: %d documents, %d tokens, %.1f MB of text in %.1f s (%.0f docs/s, %.2f MB/s)",
            self._prefix,
            self.documents,
            self.tokens,
            self.text_bytes / 1e6,
            self.seconds,
            self.documents / self.seconds,
            self.text_bytes / 1e6 / self.seconds,
        )


def _write_pair(
    folder: Path,
    sources: list[str],
    texts: Iterable[str],
    tokenizer: Tokenizer,
    workers: int,
    append_eod: bool,
    totals: _Totals,
) -> None:
    mcore = indexed_dataset()
    dtype = mcore.DType.optimal_dtype(tokenizer.vocab_size)
    builder = mcore.IndexedDatasetBuilder(str(folder / "bin"), dtype=dtype)
    try:
        with encoding(texts, Encoder(tokenizer, append_eod, dtype), workers) as batches:
            for batch in batches:
                position = 0
                for length in batch.lengths:
                    builder.add_document(batch.ids[position : position + length], [length])
                    position += length
                totals.add(batch)
        if totals.documents == 0:
            raise ConfigError(f"{', '.join(sources)}: there is no document with any text.")
        if totals.max_id >= tokenizer.vocab_size:
            raise ConfigError(
                f"The tokenizer produced the id {totals.max_id}, beyond its vocabulary of "
                f"{tokenizer.vocab_size}; its files do not belong together."
            )
        builder.finalize(str(folder / "idx"))
    finally:
        builder.data_file.close()
    tokenizer.save(folder / "tokenizer")
    idx = (folder / "idx").read_bytes()
    DataMeta(
        tokenizer=tokenizer.describe(),
        documents=totals.documents,
        tokens=totals.tokens,
        max_token_id=totals.max_id,
        append_eod=append_eod,
        sources=sources,
        bin_bytes=(folder / "bin").stat().st_size,
        bin_sha256=totals.bin_sha256.hexdigest(),
        idx_bytes=len(idx),
        idx_sha256=hashlib.sha256(idx).hexdigest(),
        document_tokens=length_quantiles(np.array(builder.sequence_lengths)),
    ).write(folder / "meta.json")
