"""Text to Megatron's `.bin/.idx`, with the tokenizer and the facts about it stored beside.

    documents -> batches of about a megabyte -> tokenizer (in a pool of processes) -> builder

The order of documents is the order of the input for any number of workers, so the bytes written
are the same. Everything is written into a folder of its own and renamed at the end, the `.idx`
last: a run that is killed leaves nothing that a reader would take for data.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eslm.data.bad_lines import BadLines, OnBadLine
from megatron_eslm.data.encode_pool import MOST_WORKERS, Encoded, Encoder, encoding
from megatron_eslm.data.megatron_imports import indexed_dataset
from megatron_eslm.data.meta import DataMeta
from megatron_eslm.data.readers import read_documents
from megatron_eslm.data.tokenizers.base import Tokenizer
from megatron_eslm.data.tokenizers.samples import warn_of_changes
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.aside import aside_folder
from megatron_eslm.files.durable import sync_file, sync_folder
from megatron_eslm.files.lock import FileLock
from megatron_eslm.files.output_prefix import output_prefix as parse_prefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreprocessReport:
    """What was written and how fast."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int
    seconds: float
    empty_documents: int
    bad_documents: int
    """Left out by `on_bad_line="skip"`."""


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
        inputs: as `read_documents` takes them; stored as the sources.
        output_prefix: path without ending; its folder is made.
        tokenizer: tokenizes, and is stored.
        workers: processes that tokenize; 1 works in this process.
        append_eod: write the tokenizer's `eod` after each document.
        text_key: field or column that holds the text.
        on_bad_line: `fail` at a document that cannot be read, or `skip` and count it.
        overwrite: replace an existing pair.
        log_interval_seconds: how often progress goes to the log.
        documents: the text itself; `inputs` then only names where it came from.

    Raises:
        ConfigError: bad input, existing output, another process that writes it, no document, a full
            disk, no permission. Nothing is left behind.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least one process has to work.")
    if workers > MOST_WORKERS:
        raise ConfigError(
            f"--workers {workers} is more than {MOST_WORKERS}; give one for each processor core, "
            f"of which there are {os.cpu_count()} here."
        )
    if log_interval_seconds < 0:
        raise ConfigError(f"--log-interval {log_interval_seconds:g} must be 0 seconds or more.")
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
            _refuse_existing(prefix, overwrite)
            with aside_folder(prefix) as folder:
                indexed_dataset()  # imports, which takes seconds that are not the text's
                totals = _Totals(prefix, log_interval_seconds)
                _write_pair(folder, list(inputs), texts, tokenizer, workers, append_eod, totals)
                _refuse_existing(prefix, overwrite)  # not everything that writes there locks it
                _publish(folder, prefix)
    except OSError as error:  # readers and tokenizers turn theirs into ConfigError
        raise ConfigError(
            f"--output-prefix {prefix} cannot be written: {error}. Make room or choose another "
            "place."
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


def _refuse_existing(prefix: Path, overwrite: bool) -> None:
    existing = [f"{prefix}{s}" for s in (".bin", ".idx") if os.path.exists(f"{prefix}{s}")]
    if existing and not overwrite:
        raise ConfigError(
            f"--output-prefix {prefix}: {' and '.join(existing)} exists already. Choose another "
            "prefix or pass --overwrite."
        )


class _Totals:
    """Sums over all batches, told to the log from time to time."""

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
        self.empty += batch.empty
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
            raise ConfigError(f"{', '.join(sources)}: no document with any text.")
        if totals.max_id >= tokenizer.vocab_size:
            raise ConfigError(
                f"The tokenizer made the id {totals.max_id} beyond its vocabulary of "
                f"{tokenizer.vocab_size}; its files do not fit together."
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
    ).write(folder / "meta.json")


def _publish(folder: Path, prefix: Path) -> None:
    """Move the finished files to their names; the pair becomes readable with the last of them.

    At every moment, also after a power failure, there is no index or all else is on the disk. Old
    and new parts that meet all the same are told apart by the sums in `.meta.json`.
    """
    for path in (*folder.glob("tokenizer/*"), *folder.iterdir()):
        (sync_folder if path.is_dir() else sync_file)(path)
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    shutil.rmtree(f"{prefix}.tokenizer", ignore_errors=True)
    sync_folder(prefix.parent)
    for part in ("tokenizer", "meta.json", "bin"):
        os.replace(folder / part, f"{prefix}.{part}")
    sync_folder(prefix.parent)
    os.replace(folder / "idx", f"{prefix}.idx")
    sync_folder(prefix.parent)
