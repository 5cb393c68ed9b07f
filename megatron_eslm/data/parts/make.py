"""Preprocess a corpus of many files: one part a file, in a pool of processes.

A worker decompresses, parses and tokenizes a whole file. Which process makes a part, in which
order, and how often it was killed before, does not change the part.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron_eslm.data.bad_lines import OnBadLine
from megatron_eslm.data.document_fields import DocumentFields
from megatron_eslm.data.encode_pool import Encoder
from megatron_eslm.data.megatron_imports import indexed_dataset
from megatron_eslm.data.parts.domain_names import DomainNames
from megatron_eslm.data.parts.part import PartMaker, PartRecord, read_record
from megatron_eslm.data.parts.plan import InputFile, PartsPlan, agree, parts_folder
from megatron_eslm.data.tokenizers.base import Tokenizer
from megatron_eslm.data.tokenizers.samples import warn_of_changes
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.lock import FileLock
from megatron_eslm.files.stopped import Stopped, signals_wait
from megatron_eslm.watchdog.parent import heed_parent_only

logger = logging.getLogger(__name__)


def make_parts(
    sources: list[str],
    files: list[Path],
    prefix: Path,
    tokenizer: Tokenizer,
    *,
    fields: DocumentFields,
    names: DomainNames,
    workers: int,
    append_eod: bool,
    on_bad_line: OnBadLine,
    index: int = 0,
    of: int = 1,
    log_interval_seconds: float = 10.0,
) -> bool:
    """Make the parts of `files[index::of]` that are not finished yet.

    Args:
        sources: inputs as given; stored.
        files: all input files of the corpus, the same for each index.
        prefix: parts go to `PREFIX.parts`.
        tokenizer: stored there, too.
        fields: fields of a document.
        names: names of domains.
        workers: processes; 1 works in this process.
        append_eod: write the tokenizer's `eod` after each document.
        on_bad_line: `fail` at a document that cannot be read, or `skip` and count it.
        index, of: which share of the files.
        log_interval_seconds: interval of progress messages.

    Returns:
        Whether the parts of all files, of any index, are finished.

    Raises:
        ConfigError: bad input, parts of another plan, another process with this index, or a full
            disk. Finished parts are kept.
    """
    folder = parts_folder(prefix)
    warn_of_changes(tokenizer)
    dtype = indexed_dataset().DType.optimal_dtype(tokenizer.vocab_size)
    plan = PartsPlan(
        sources=sources,
        inputs=[InputFile(path=str(file), bytes=file.stat().st_size) for file in files],
        tokenizer=tokenizer.describe(),
        text_key=fields.text_key,
        split_key=fields.split_key,
        domain_names=dict(names.names) if fields.split_key is not None else {},
        all_named=names.complete,
        append_eod=append_eod,
        on_bad_line=on_bad_line,
    )
    owner = f"{index}-of-{of}"
    maker = PartMaker(
        folder=folder,
        encoder=Encoder(tokenizer, append_eod, dtype),
        fields=fields,
        names=names,
        on_bad_line=on_bad_line,
    )
    try:
        agree(folder, plan, tokenizer)
        with FileLock(folder / f".{owner}.lock") as lock:
            lock.take(f"--index {index} --of {of} of {prefix}", "Wait for it to end.")
            for draft in folder.glob(f".*.{owner}.*.ids"):
                draft.unlink(missing_ok=True)
            mine = range(index, len(files), of)
            finished = [n for n in mine if read_record(folder, n) is not None]
            if finished:
                logger.info(
                    "%s: %d of %d inputs were done before", prefix, len(finished), len(mine)
                )
            missing = sorted(set(mine) - set(finished))
            progress = _Progress(prefix, plan, missing, log_interval_seconds)
            _make(maker, plan, missing, owner, workers, progress)
            progress.log()
    except Stopped as stop:
        stop.remains = "inputs that were done are kept, and the same command does the others"
        raise
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error}. Free some space or choose another place; "
            "inputs that were done are kept."
        ) from error
    return all((folder / f"{n}.json").exists() for n in range(len(files)))


class _Progress:
    """Sums over finished inputs, logged periodically with the time left."""

    def __init__(self, prefix: Path, plan: PartsPlan, missing: list[int], seconds: float) -> None:
        self._prefix, self._plan, self._interval = prefix, plan, seconds
        self._count, self._total = 0, len(missing)
        self._bytes, self._total_bytes = 0, sum(plan.inputs[n].bytes for n in missing)
        self._documents = self._tokens = self._text_bytes = 0
        self._start = self._last = time.monotonic()

    def add(self, number: int, record: PartRecord) -> None:
        self._count += 1
        self._bytes += self._plan.inputs[number].bytes
        self._documents += record.documents
        self._tokens += record.tokens
        self._text_bytes += record.text_bytes
        if record.bad_documents:
            logger.warning(
                "%s: left out %d bad documents (the first: %s)",
                record.input,
                record.bad_documents,
                record.first_bad,
            )
        if time.monotonic() - self._last >= self._interval:
            self.log()

    def log(self) -> None:
        self._last = time.monotonic()
        seconds = max(self._last - self._start, 1e-9)
        left = seconds * (self._total_bytes - self._bytes) / max(self._bytes, 1)
        logger.info(
            "%s: %d of %d inputs, %d documents, %d tokens, %.1f MB of text in %.1f s "
            "(%.2f MB/s), %.0f s left",
            self._prefix,
            self._count,
            self._total,
            self._documents,
            self._tokens,
            self._text_bytes / 1e6,
            seconds,
            self._text_bytes / 1e6 / seconds,
            left,
        )


def _make(
    maker: PartMaker,
    plan: PartsPlan,
    missing: list[int],
    owner: str,
    workers: int,
    progress: _Progress,
) -> None:
    if workers == 1:
        for number in missing:
            progress.add(number, maker.make(number, plan.inputs[number].path, owner))
        return
    if not missing:
        return
    # fork: workers inherit the tokenizer and need no imports.
    pool = ProcessPoolExecutor(
        min(workers, len(missing)),
        multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(maker, os.getpid()),
    )
    try:
        with signals_wait():  # the first submission starts all processes
            made = {pool.submit(_make_in_worker, n, plan.inputs[n].path, owner): n for n in missing}
        for future in as_completed(made):
            progress.add(made[future], future.result())
    except BrokenProcessPool as error:
        raise ConfigError(
            f"One of the --workers {workers} processes was killed, most likely for lack of memory. "
            "Use fewer workers; inputs that were done are kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_maker: PartMaker | None = None  # set in worker processes only, by their initializer


def _start_worker(maker: PartMaker, parent: int) -> None:
    global _maker
    _maker = maker
    heed_parent_only(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core here


def _make_in_worker(number: int, path: str, owner: str) -> PartRecord:
    assert _maker is not None
    return _maker.make(number, path, owner)
