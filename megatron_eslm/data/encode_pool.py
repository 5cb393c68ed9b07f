"""Tokenization in a pool of processes, in input order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from megatron_eslm.data.tokenizers.base import Tokenizer, clean_text
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.stopped import signals_wait
from megatron_eslm.watchdog.parent import heed_parent_only

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
_BATCHES_AHEAD_PER_WORKER = 3
MOST_WORKERS = 1024
"""More than any machine can use. All start at once, so a typo must not get through."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized batch of documents."""

    ids: np.ndarray
    """Ids of all documents, concatenated, in the dtype of the file."""
    lengths: list[int]
    """Number of ids of each document."""
    text_bytes: int
    empty: list[int]
    """Positions in the batch of documents without ids, which are left out."""
    max_id: int


@dataclass(frozen=True)
class Encoder:
    """Everything a worker needs to encode a batch."""

    tokenizer: Tokenizer
    append_eod: bool
    dtype: type[np.integer]

    def encode(self, texts: list[str]) -> Encoded:
        """Encode one batch."""
        texts = [clean_text(text) for text in texts]
        encoded = self.tokenizer.encode_arrays(texts)
        arrays = [ids for ids in encoded if len(ids)]
        eod = np.array([self.tokenizer.eod])
        parts = [part for ids in arrays for part in ((ids, eod) if self.append_eod else (ids,))]
        flat = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return Encoded(
            flat.astype(self.dtype),
            [len(ids) + self.append_eod for ids in arrays],
            sum(len(text.encode()) for text in texts),
            [n for n, ids in enumerate(encoded) if not len(ids)],
            int(flat.max()) if len(flat) else -1,
        )


@contextmanager
def encoding(texts: Iterable[str], encoder: Encoder, workers: int) -> Iterator[Iterator[Encoded]]:
    """Encode texts in batches of about a megabyte and yield the batches in input order.

    The number of batches in flight is limited, so memory is bounded. The pool's processes end with
    the block, or with this process if it is killed.

    Args:
        texts: documents.
        encoder: encodes a batch.
        workers: number of processes; 1 encodes in this process.

    Raises:
        ConfigError: (while iterating) a worker was killed, or the system cannot start the workers.
    """
    if workers == 1:
        yield map(encoder.encode, batches(texts))
        return
    # fork: workers inherit the tokenizer and need no imports.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encoder, os.getpid()),
    )
    try:
        yield _in_order(pool, batches(texts), workers * _BATCHES_AHEAD_PER_WORKER)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"One of the --workers {workers} processes was killed, most likely for lack of memory. "
            "Use fewer workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterator[list[str]], most_under_way: int
) -> Iterator[Encoded]:
    under_way: deque[Future[Encoded]] = deque()
    for batch in batches:
        under_way.append(_submit(pool, batch))
        if len(under_way) >= most_under_way:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _submit(pool: ProcessPoolExecutor, batch: list[str]) -> Future[Encoded]:
    """Submit a batch. The first call starts all processes, which the system may refuse."""
    others = set(multiprocessing.active_children())
    try:
        with signals_wait():
            return pool.submit(_encode_in_worker, batch)
    except OSError as error:
        # The pool loses track of those already started, and the interpreter would wait for them.
        started = set(multiprocessing.active_children()) - others
        for process in started:
            process.kill()
        for process in started:
            process.join()
        raise ConfigError(
            f"--workers: the system starts no more than {len(started)} processes here "
            f"({error.strerror}). Use fewer; 1 works in this process."
        ) from error


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into batches of about a megabyte."""
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


_encoder: Encoder | None = None  # set in worker processes only, by their initializer


def _start_worker(encoder: Encoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    heed_parent_only(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core here


def _encode_in_worker(texts: list[str]) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(texts)
