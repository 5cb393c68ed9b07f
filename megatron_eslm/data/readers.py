"""Read documents from files, folders and Hugging Face data sets, one at a time.

Every reader is a generator, so memory holds one document (or one parquet batch), never a file. A
`.txt` file is one document and is read at once.
"""

from __future__ import annotations

import io
import logging
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron_eslm.data.bad_lines import BadLines
from megatron_eslm.data.document_fields import Document, DocumentFields
from megatron_eslm.data.hub import check_data_set, is_hub_name
from megatron_eslm.data.input_files import find_files
from megatron_eslm.data.json_lines import COMPRESSIONS, decompressed, read_json_lines
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.regular import open_regular

logger = logging.getLogger(__name__)

Reader = Callable[[BinaryIO, str, DocumentFields, BadLines], Iterator[Document]]
"""Takes an open file, its name for messages, the fields and the handler of bad lines."""


def read_documents(
    paths: Sequence[str], text_key: str = "text", bad: BadLines | None = None
) -> Iterator[str]:
    """Yield the documents of all inputs in the order given.

    Args:
        paths: each a `.jsonl`/`.json` file (one JSON object per line; also `.gz`, `.bz2`, `.xz` and
            `.zst`), `-` for such lines from standard input, a `.parquet` file, a `.txt` file (one
            document), a folder of such files (see `find_files`), a folder written by
            `datasets.save_to_disk`, or the name of a Hugging Face data set as
            `NAME[:CONFIG[:SPLIT]]` (split `train` by default).
        text_key: field or column that holds the text.
        bad: handles the errors about single documents; by default the first one is raised.

    Raises:
        ConfigError: an input is missing, unreadable, broken, or has no such field or no documents;
            names the file and, if known, the line.
    """
    if not paths:
        raise ConfigError("No input given; name at least one file, folder or data set.")
    if list(paths).count("-") > 1:
        raise ConfigError("--input names standard input (-) twice, but it can be read only once.")
    bad = bad or BadLines()
    for name in paths:
        for document in read_input(name, DocumentFields(text_key=text_key), bad):
            yield document.text


def read_input(name: str, fields: DocumentFields, bad: BadLines) -> Iterator[Document]:
    """Yield the documents of one input of `read_documents`; errors as there."""
    count, bad_before = 0, bad.count
    for document in _read_input(name, fields, bad):
        count += 1
        yield document
    if count == 0:
        bad_here = bad.count - bad_before
        raise ConfigError(
            f"{name} holds no document{f' but {bad_here} bad ones' if bad_here else ''}. Check "
            "that it is the right file, or leave it out."
        )


def _read_input(name: str, fields: DocumentFields, bad: BadLines) -> Iterator[Document]:
    if name == "-":
        yield from _read_standard_input(fields, bad)
        return
    path = Path(name).expanduser()
    mode = _mode(path)
    if mode is None:
        if _reader_of(path) or not is_hub_name(name.partition(":")[0]):
            # Never ask a server for something that is evidently a path.
            raise ConfigError(f"There is no file or folder {name}.")
        yield from _read_hub_dataset(name, fields, bad)
    elif not stat.S_ISDIR(mode):
        yield from _read_file(path, fields, bad)
    elif is_saved_dataset(path):
        yield from _read_saved_dataset(path, fields, bad)
    else:
        for file in find_files(path, list(_READERS)):
            yield from _read_file(file, fields, bad)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote it."""
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def _mode(path: Path) -> int | None:
    """File mode of `path`; None if it does not exist."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise ConfigError(f"The input {str(path)!r} cannot be read: {error}.") from error


def _read_standard_input(fields: DocumentFields, bad: BadLines) -> Iterator[Document]:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError(
            "--input - reads JSON lines from standard input, but nothing is piped in."
        )
    try:
        yield from read_json_lines(sys.stdin.buffer, "standard input", fields, bad)
    except OSError as error:
        raise ConfigError(f"Standard input cannot be read: {error}.") from error


def _reader_of(path: Path) -> Reader | None:
    for ending, reader in _READERS.items():
        if path.name.endswith(ending):
            return reader
    return None


def _read_file(path: Path, fields: DocumentFields, bad: BadLines) -> Iterator[Document]:
    reader = _reader_of(path)
    if reader is None:
        raise ConfigError(
            f"{path} has an unsupported file type; its name should end in one of "
            f"{', '.join(_READERS)}."
        )
    try:
        with open_regular(path) as file:
            yield from reader(file, str(path), fields, bad)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _read_lines(
    file: BinaryIO, name: str, fields: DocumentFields, bad: BadLines, compression: str
) -> Iterator[Document]:
    yield from read_json_lines(decompressed(file, name, compression), name, fields, bad)


def _read_parquet(
    file: BinaryIO, name: str, fields: DocumentFields, bad: BadLines
) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_columns(table.schema_arrow.names, fields, name)
            batches = table.iter_batches(batch_size=256, columns=fields.columns)
            records = (record for batch in batches for record in batch.to_pylist())
            for row, record in enumerate(records, start=1):
                yield from _one(record, fields, f"{name}, row {row}", bad)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{name} is not a readable parquet file: {error}.") from error


def _check_columns(columns: Sequence[str], fields: DocumentFields, name: str) -> None:
    """Raise ConfigError if a column is missing."""
    for column in fields.columns:
        if column not in columns:
            role, flag = (
                ("text", "--text-key") if column == fields.text_key else ("domain", "--split-key")
            )
            raise ConfigError(
                f"{name} has no column {column!r} (it has {', '.join(map(repr, columns))}). Name "
                f"the column that holds the {role} with {flag}."
            )


def _one(
    record: Mapping[str, Any], fields: DocumentFields, where: str, bad: BadLines
) -> Iterator[Document]:
    """Yield the document in a record, or report that a field of it cannot be used."""
    try:
        document = fields.document(record, where)
    except ConfigError as error:
        bad.found(error)
        return
    yield document


def _read_txt(
    file: BinaryIO, name: str, fields: DocumentFields, bad: BadLines
) -> Iterator[Document]:
    try:
        text = io.TextIOWrapper(file, encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        bad.found(ConfigError(f"{name} is not UTF-8 text: {error}."))
        return
    if text.strip():
        yield fields.whole_file(text, name)


_READERS: dict[str, Reader] = {
    **{
        kind + compression: partial(_read_lines, compression=compression)
        for kind in (".jsonl", ".json")
        for compression in COMPRESSIONS
    },
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}

FILE_ENDINGS = tuple(_READERS)
"""Suffixes of the files that can be read."""


def _rows(dataset, where: str, fields: DocumentFields, bad: BadLines) -> Iterator[Document]:
    columns = dataset.column_names
    if columns is not None:
        _check_columns(columns, fields, where)
        dataset = dataset.select_columns(fields.columns)
    row = 0
    try:
        for record in dataset:
            row += 1
            if fields.text_key not in record:
                raise ConfigError(
                    f"{where}, row {row} has no field {fields.text_key!r}; see --text-key."
                )
            yield from _one(record, fields, f"{where}, row {row}", bad)
    except ConfigError:
        raise
    except Exception as error:  # many kinds: the network, a damaged shard
        raise ConfigError(f"{where} cannot be read beyond row {row}: {error}.") from error


def _read_saved_dataset(path: Path, fields: DocumentFields, bad: BadLines) -> Iterator[Document]:
    """Read a folder written by `save_to_disk`; if it has several splits, read `train`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise ConfigError(f"The data set in {path} cannot be loaded: {error}.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ConfigError(
                f"{path} has the splits {', '.join(loaded)} but no `train`; give the folder of "
                "one split."
            )
        loaded = loaded["train"]
    yield from _rows(loaded, str(path), fields, bad)


def _read_hub_dataset(name: str, fields: DocumentFields, bad: BadLines) -> Iterator[Document]:
    """Stream the data set `NAME[:CONFIG[:SPLIT]]`, downloading only the current part."""
    import datasets

    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    check_data_set("--input", repository)
    logger.info("%s is not a local file; using the Hugging Face data set of that name", name)
    try:
        dataset = datasets.load_dataset(
            repository, config or None, split=split or "train", streaming=True
        )
    except Exception as error:  # many kinds: network, unknown name, unknown split
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name} is neither a file or folder here nor a Hugging Face data set that can be "
            f"loaded ({reason}). Write data sets as NAME[:CONFIG[:SPLIT]]."
        ) from error
    yield from _rows(dataset, name, fields, bad)
