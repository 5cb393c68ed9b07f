"""The part of a corpus that one input file makes: `N.ids` and, when that is whole, `N.json`.

N.ids: token ids [tokens] in the order of the file, then int32 lengths [documents], then uint16
domains [documents], which count into `domains` of N.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_eslm.data.bad_lines import BadLines, OnBadLine
from megatron_eslm.data.document_fields import Document, DocumentFields
from megatron_eslm.data.encode_pool import Encoder, batches
from megatron_eslm.data.meta import Sha256
from megatron_eslm.data.parts.domain_names import DomainNames
from megatron_eslm.data.readers import read_input
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.checksum import sha256_of
from megatron_eslm.files.durable import write_whole
from megatron_eslm.files.schema import STRICT, Count, read_as

ONE_DOMAIN = ""
"""Name of the only domain without `--split-key`."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """`N.json`."""

    __pydantic_config__ = STRICT
    input: str
    domains: list[str]
    documents: Count
    tokens: Count
    text_bytes: Count
    empty_documents: Count
    bad_documents: Count
    first_bad: str
    max_token_id: int
    sha256: Sha256
    """Of N.ids."""


@dataclass(frozen=True, kw_only=True)
class PartMaker:
    """Everything a worker needs to make a part."""

    folder: Path
    encoder: Encoder
    fields: DocumentFields
    names: DomainNames
    on_bad_line: OnBadLine

    def make(self, number: int, path: str, owner: str) -> PartRecord:
        """Read, tokenize and store one input.

        Args:
            number: of the input in the plan.
            path: the input.
            owner: name of this share of the inputs, in the names of drafts, so that the next
                process with that share can remove what a killed one left.

        Raises:
            ConfigError: the input cannot be used.
            OSError: the part cannot be written.
        """
        draft = self.folder / f".{number}.{owner}.{os.getpid()}.ids"
        bad = BadLines(self.on_bad_line)
        domains: dict[str, int] = {}
        lengths: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        tokens = text_bytes = empty = 0
        max_id = -1
        digest = hashlib.sha256()
        with draft.open("wb") as file:
            for texts, of_text in self._batches(path, bad, domains):
                batch = self.encoder.encode(texts)
                lengths.append(np.array(batch.lengths, dtype="<i4"))
                numbers.append(np.delete(np.array(of_text, dtype="<u2"), batch.empty))
                digest.update(batch.ids.data)
                file.write(batch.ids.data)
                tokens += len(batch.ids)
                text_bytes += batch.text_bytes
                empty += len(batch.empty)
                max_id = max(max_id, batch.max_id)
            for array in (*lengths, *numbers):
                digest.update(array.tobytes())
                file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.folder / f"{number}.ids")
        record = PartRecord(
            input=path,
            domains=list(domains),
            documents=sum(map(len, lengths)),
            tokens=tokens,
            text_bytes=text_bytes,
            empty_documents=empty,
            bad_documents=bad.count,
            first_bad=bad.first,
            max_token_id=max_id,
            sha256=digest.hexdigest(),
        )
        text = json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n"
        write_whole(self.folder / f"{number}.json", text.encode())
        return record

    def _batches(
        self, path: str, bad: BadLines, domains: dict[str, int]
    ) -> Iterator[tuple[list[str], list[int]]]:
        """Yield texts and the numbers of their domains; new domains get the next number."""
        numbers: list[int] = []

        def texts() -> Iterator[str]:
            for document in read_input(path, self.fields, bad):
                name = self._name(document, path)
                numbers.append(domains.setdefault(name, len(domains)))
                if len(domains) > 2**16:
                    raise ConfigError(
                        f"{path}: --split-key {self.fields.split_key} has more than {2**16} "
                        "values; it does not name a domain."
                    )
                yield document.text

        for batch in batches(texts()):
            here, numbers[:] = numbers[: len(batch)], numbers[len(batch) :]
            yield batch, here

    def _name(self, document: Document, path: str) -> str:
        if self.fields.split_key is None:
            return ONE_DOMAIN
        return self.names.of(document.domain, path)


def read_record(folder: Path, number: int) -> PartRecord | None:
    """The record of a part; None if the part is not finished.

    Raises:
        ConfigError: the record is damaged.
    """
    path = folder / f"{number}.json"
    try:
        return read_as(PartRecord, path)
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise ConfigError(f"{error} Remove {path} and preprocess again.") from error


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that has passed its checks."""

    ids: np.ndarray
    """Token ids [tokens]; a memory map."""
    lengths: np.ndarray
    """int32 [documents]."""
    domains: np.ndarray
    """uint16 [documents]: numbers in the record's `domains`."""


def open_part(folder: Path, number: int, record: PartRecord, dtype: type[np.integer]) -> Part:
    """Read a part and check it against its record.

    Raises:
        ConfigError: it is missing or damaged.
    """
    path = folder / f"{number}.ids"
    remedy = f"Remove {folder / f'{number}.json'} and give the command of preprocessing again."
    try:
        same = sha256_of(path) == record.sha256
    except OSError as error:
        raise ConfigError(
            f"The part of {record.input} cannot be read ({path}: {error.strerror}). {remedy}"
        ) from error
    if not same:
        raise ConfigError(
            f"The part of {record.input} is damaged: the checksum of {path} differs from its "
            f"record. {remedy}"
        )
    if record.documents == 0:
        nothing = np.zeros(0, np.int32)
        return Part(ids=nothing.astype(dtype), lengths=nothing, domains=nothing.astype("<u2"))
    end = record.tokens * np.dtype(dtype).itemsize
    n = record.documents
    return Part(
        ids=np.memmap(path, dtype, "r", 0, (record.tokens,)),
        lengths=np.fromfile(path, "<i4", n, offset=end),
        domains=np.fromfile(path, "<u2", n, offset=end + 4 * n),
    )
