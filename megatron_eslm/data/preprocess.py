"""Text to Megatron's `.bin/.idx`, with the tokenizer and the facts about it stored beside.

    documents -> batches of about a megabyte -> tokenizer (in a pool of processes) -> builder

The order of documents is the order of the input for any number of workers, so the bytes written
are the same. Everything is written into a folder of its own and renamed at the end, the `.idx`
last: a run that is killed leaves nothing that a reader would take for data.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_eslm.data.meta import DataMeta
from megatron_eslm.data.quiet import indexed_dataset
from megatron_eslm.data.readers import read_documents
from megatron_eslm.data.tokenizer_base import Tokenizer, clean_text
from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
_BATCHES_AHEAD_PER_WORKER = 3


@dataclass(frozen=True, kw_only=True)
class PreprocessReport:
    """What was written and how fast."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int
    seconds: float
    empty_documents: int


@dataclass(frozen=True)
class _Encoded:
    ids: np.ndarray
    """All documents of a batch end to end, in the type of the file."""
    lengths: list[int]
    text_bytes: int
    empty: int
    max_id: int


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    append_eod: bool = True,
    text_key: str = "text",
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
        overwrite: replace an existing pair.
        log_interval_seconds: how often progress goes to the log.
        documents: the text itself; `inputs` then only names where it came from.

    Raises:
        ConfigError: bad input, existing output, no document, a full disk, no permission. Nothing is
            left behind.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least one process has to work.")
    prefix = Path(output_prefix)
    existing = [f"{prefix}{s}" for s in (".bin", ".idx") if os.path.exists(f"{prefix}{s}")]
    if existing and not overwrite:
        raise ConfigError(
            f"--output-prefix {prefix}: {' and '.join(existing)} exists already. Choose another "
            "prefix or pass --overwrite."
        )
    texts = read_documents(inputs, text_key) if documents is None else documents
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for stale in prefix.parent.glob(f"{prefix.name}.building-*"):
            logger.warning("%s was left by a run that was stopped or still goes on", stale)
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix.name}.building-", dir=prefix.parent))
    except OSError as error:
        raise ConfigError(f"--output-prefix {prefix} cannot be written: {error}.") from error
    try:
        report = _write_pair(
            folder,
            prefix,
            list(inputs),
            texts,
            tokenizer,
            workers,
            append_eod,
            log_interval_seconds,
        )
        _publish(folder, prefix)
    except OSError as error:  # readers and tokenizers turn theirs into ConfigError
        raise ConfigError(
            f"--output-prefix {prefix} cannot be written: {error}. Make room or choose another "
            "place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    logger.info(
        "%s: %d documents, %d tokens, %.1f MB of text in %.1f s (%.0f docs/s, %.2f MB/s)",
        prefix,
        report.documents,
        report.tokens,
        report.text_bytes / 1e6,
        report.seconds,
        report.documents / report.seconds,
        report.text_bytes / 1e6 / report.seconds,
    )
    return report


def _write_pair(
    folder: Path,
    prefix: Path,
    sources: Sequence[str],
    texts: Iterable[str],
    tokenizer: Tokenizer,
    workers: int,
    append_eod: bool,
    log_interval_seconds: float,
) -> PreprocessReport:
    mcore = indexed_dataset()
    dtype = mcore.DType.optimal_dtype(tokenizer.vocab_size)
    job = _Job(tokenizer, append_eod, dtype)
    builder = mcore.IndexedDatasetBuilder(str(folder / "bin"), dtype=dtype)
    start = last_log = time.monotonic()
    count = tokens = text_bytes = empty = 0
    max_id = -1
    digest = hashlib.sha256()
    try:
        for batch in _encoded(_batches(texts), job, workers):
            position = 0
            for length in batch.lengths:
                builder.add_document(batch.ids[position : position + length], [length])
                position += length
            digest.update(batch.ids.data)
            count += len(batch.lengths)
            tokens += position
            text_bytes += batch.text_bytes
            empty += batch.empty
            max_id = max(max_id, batch.max_id)
            now = time.monotonic()
            if now - last_log >= log_interval_seconds:
                last_log = now
                logger.info(
                    "%s: %d documents, %d tokens; %.0f docs/s, %.2f MB/s",
                    prefix,
                    count,
                    tokens,
                    count / (now - start),
                    text_bytes / 1e6 / (now - start),
                )
        if count == 0:
            raise ConfigError(
                f"{', '.join(sources)}: no document with any text, so nothing was written to "
                f"{prefix}."
            )
        if max_id >= tokenizer.vocab_size:
            raise ConfigError(
                f"The tokenizer made the id {max_id} beyond its vocabulary of "
                f"{tokenizer.vocab_size}; its files do not fit together."
            )
        builder.finalize(str(folder / "idx"))
    finally:
        builder.data_file.close()
    tokenizer.save(folder / "tokenizer")
    idx = (folder / "idx").read_bytes()
    DataMeta(
        tokenizer=tokenizer.describe(),
        documents=count,
        tokens=tokens,
        max_token_id=max_id,
        append_eod=append_eod,
        sources=list(sources),
        bin_bytes=(folder / "bin").stat().st_size,
        bin_sha256=digest.hexdigest(),
        idx_bytes=len(idx),
        idx_sha256=hashlib.sha256(idx).hexdigest(),
    ).write(folder / "meta.json")
    return PreprocessReport(
        prefix=str(prefix),
        documents=count,
        tokens=tokens,
        text_bytes=text_bytes,
        seconds=max(time.monotonic() - start, 1e-9),
        empty_documents=empty,
    )


def _publish(folder: Path, prefix: Path) -> None:
    """Move the finished files to their names; the pair becomes readable with the last of them."""
    for part in ("bin", "idx", "meta.json"):
        with (folder / part).open("rb") as file:
            os.fsync(file.fileno())
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    shutil.rmtree(f"{prefix}.tokenizer", ignore_errors=True)
    for part in ("tokenizer", "meta.json", "bin", "idx"):
        os.replace(folder / part, f"{prefix}.{part}")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _Job:
    """What a worker needs to encode a batch."""

    tokenizer: Tokenizer
    append_eod: bool
    dtype: type[np.integer]

    def encode(self, texts: list[str]) -> _Encoded:
        texts = [clean_text(text) for text in texts]
        arrays = [ids for ids in self.tokenizer.encode_arrays(texts) if len(ids)]
        eod = np.array([self.tokenizer.eod])
        parts = [part for ids in arrays for part in ((ids, eod) if self.append_eod else (ids,))]
        flat = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return _Encoded(
            flat.astype(self.dtype),
            [len(ids) + self.append_eod for ids in arrays],
            sum(len(text.encode()) for text in texts),
            len(texts) - len(arrays),
            int(flat.max()) if len(flat) else -1,
        )


_job: _Job | None = None  # set in worker processes only, by their initializer


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core here


def _encode_in_worker(texts: list[str]) -> _Encoded:
    assert _job is not None
    return _job.encode(texts)


def _encoded(batches: Iterator[list[str]], job: _Job, workers: int) -> Iterator[_Encoded]:
    """Encode in order. With a pool, only so many batches are under way, so memory is bounded."""
    if workers == 1:
        yield from map(job.encode, batches)
        return
    # fork: workers have the tokenizer at once and need not import anything.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(job,)
    )
    under_way: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_encode_in_worker, batch))
            if len(under_way) >= workers * _BATCHES_AHEAD_PER_WORKER:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"One of the --workers {workers} processes was killed, most likely for want of memory. "
            "Use fewer workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
