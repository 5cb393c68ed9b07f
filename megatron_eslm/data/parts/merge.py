"""Merge the parts of a corpus into one pair for each domain, in the order of the inputs."""

from __future__ import annotations

import hashlib
import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_eslm.data.index_writer import write_index
from megatron_eslm.data.length_quantiles import length_quantiles
from megatron_eslm.data.megatron_imports import indexed_dataset
from megatron_eslm.data.meta import DataMeta
from megatron_eslm.data.parts.part import ONE_DOMAIN, Part, PartRecord, open_part, read_record
from megatron_eslm.data.parts.plan import PartsPlan, parts_folder, read_plan
from megatron_eslm.data.publish import publish_pair, refuse_existing
from megatron_eslm.data.tokenizers.build import Tokenizer, load_tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.aside import aside_folder
from megatron_eslm.files.checksum import sha256_of
from megatron_eslm.files.lock import FileLock

logger = logging.getLogger(__name__)

_CHUNK_DOCUMENTS = 1 << 14


def merge_parts(prefix: Path, *, overwrite: bool = False) -> list[Path]:
    """Merge `PREFIX.parts` and remove it.

    The bytes depend on the inputs, the fields and the tokenizer only.

    Returns:
        Prefixes of the pairs: `PREFIX/DOMAIN` with --split-key, else `PREFIX`.

    Raises:
        ConfigError: a part is missing or damaged, or a pair exists. Nothing is changed.
        OSError: the pairs cannot be written.
    """
    folder = parts_folder(prefix)
    try:
        plan = read_plan(folder)
    except FileNotFoundError as error:
        raise ConfigError(
            f"There are no parts in {folder}. Give the --output-prefix of preprocessing with "
            "--split-key or --of, or name pairs to merge with --input."
        ) from error
    with FileLock(folder / ".merge.lock") as lock:
        lock.take(f"--output-prefix {prefix}", "Wait for it to end.")
        records = _records(folder, plan)
        domains = sorted({name for record in records for name in record.domains})
        targets = {name: prefix if name == ONE_DOMAIN else prefix / name for name in domains}
        begun = folder / "publishing"  # a killed merge may go on over its own files
        if not begun.exists():
            for target in targets.values():
                refuse_existing(target, overwrite)
        tokenizer = load_tokenizer(folder / "tokenizer")
        with aside_folder(prefix) as staging:
            _write_pairs(staging, folder, plan, records, domains, tokenizer)
            begun.touch()
            for number, name in enumerate(domains):
                targets[name].parent.mkdir(parents=True, exist_ok=True)
                publish_pair(staging / str(number), targets[name])
    shutil.rmtree(folder)
    return list(targets.values())


def _records(folder: Path, plan: PartsPlan) -> list[PartRecord]:
    """Read the records of all parts."""
    found = [read_record(folder, number) for number in range(len(plan.inputs))]
    missing = [plan.inputs[n].path for n, record in enumerate(found) if record is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{folder}: {len(missing)} of {len(found)} inputs are not done: "
            f"{', '.join(missing[:3])}{more}. Give the command of preprocessing again for each "
            "--index; it does only what is missing."
        )
    return [record for record in found if record is not None]


def _write_pairs(
    staging: Path,
    folder: Path,
    plan: PartsPlan,
    records: list[PartRecord],
    domains: list[str],
    tokenizer: Tokenizer,
) -> None:
    """Write `staging/NUMBER/` with bin, idx, meta.json and tokenizer of each domain."""
    dtype = indexed_dataset().DType.optimal_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = {
            name: _DomainWriter(staging / str(number), stack) for number, name in enumerate(domains)
        }
        for number, record in enumerate(records):
            part = open_part(folder, number, record, dtype)
            for domain, name in enumerate(record.domains):
                writers[name].add(part, domain)
    for writer in writers.values():
        writer.finish(plan, tokenizer, dtype)


class _DomainWriter:
    """Writes one pair; lengths go through a file, for they may be half a billion."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        folder.mkdir()
        self._folder = folder
        self._bin: BinaryIO = stack.enter_context((folder / "bin").open("wb"))
        self._lengths: BinaryIO = stack.enter_context((folder / "lengths").open("wb"))
        self._digest = hashlib.sha256()
        self._documents = self._tokens = 0
        self._max_id = -1

    def add(self, part: Part, domain: int) -> None:
        """Append the documents of a domain, in the order of the part."""
        begin = 0
        for first in range(0, len(part.lengths), _CHUNK_DOCUMENTS):
            lengths = part.lengths[first : first + _CHUNK_DOCUMENTS]
            ours = part.domains[first : first + _CHUNK_DOCUMENTS] == domain
            end = begin + int(lengths.sum(dtype=np.int64))
            ids = part.ids[begin:end][np.repeat(ours, lengths)]
            begin = end
            if not len(ids):
                continue
            self._digest.update(ids.data)
            self._bin.write(ids.data)
            self._lengths.write(lengths[ours].tobytes())
            self._documents += int(ours.sum())
            self._tokens += len(ids)
            self._max_id = max(self._max_id, int(ids.max()))

    def finish(self, plan: PartsPlan, tokenizer: Tokenizer, dtype: type[np.integer]) -> None:
        """Write index, metadata and tokenizer; the files of the stack are closed before."""
        if self._max_id >= tokenizer.vocab_size:
            raise ConfigError(
                f"The parts hold the id {self._max_id}, beyond the vocabulary of "
                f"{tokenizer.vocab_size}; the tokenizer's files do not belong together."
            )
        lengths = np.memmap(self._folder / "lengths", "<i4", "r", 0, (self._documents,))
        write_index(self._folder / "idx", dtype, lengths)
        tokenizer.save(self._folder / "tokenizer")
        DataMeta(
            tokenizer=tokenizer.describe(),
            documents=self._documents,
            tokens=self._tokens,
            max_token_id=self._max_id,
            append_eod=plan.append_eod,
            sources=plan.sources,
            bin_bytes=(self._folder / "bin").stat().st_size,
            bin_sha256=self._digest.hexdigest(),
            idx_bytes=(self._folder / "idx").stat().st_size,
            idx_sha256=sha256_of(self._folder / "idx"),
            document_tokens=length_quantiles(lengths),
        ).write(self._folder / "meta.json")
        (self._folder / "lengths").unlink()
