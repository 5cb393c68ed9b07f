"""Documents out of files, folders and Hugging Face data sets, one at a time.

Every reader is a generator: memory holds one document (or one parquet batch), never a file. Only
`.txt` is read whole, because there one file is one document.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 17


def read_documents(paths: Sequence[str], text_key: str = "text") -> Iterator[str]:
    """Yield the documents of every input in the order given.

    Args:
        paths: each a `.jsonl`/`.json` file (one JSON object a line; also `.gz` and `.zst`), a
            `.parquet` file, a `.txt` file (the whole file is one document), a folder of those (read
            in sorted order, subfolders too), a folder written by `datasets.save_to_disk`, or the
            name of a Hugging Face data set as `NAME[:CONFIG[:SPLIT]]` (split `train` by default).
        text_key: field or column that holds the text.

    Raises:
        ConfigError: an input is missing, unreadable, broken, without the field, or without any
            document; names the file and, where there is one, the line.
    """
    if not paths:
        raise ConfigError("No input was given; name at least one file, folder or data set.")
    for name in paths:
        count = 0
        for document in _read_input(name, text_key):
            count += 1
            yield document
        if count == 0:
            raise ConfigError(
                f"{name} holds no document. Check that it is the right file, or leave it out."
            )


def _read_input(name: str, text_key: str) -> Iterator[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        if any((path / f).exists() for f in ("dataset_info.json", "dataset_dict.json")):
            yield from _read_saved_dataset(path, text_key)
            return
        files = sorted(p for p in path.rglob("*") if p.is_file() and _reader_of(p) is not None)
        if not files:
            raise ConfigError(
                f"The folder {path} holds no file that can be read ({', '.join(_READERS)})."
            )
        for file in files:
            yield from _read_file(file, text_key)
    elif path.exists():
        yield from _read_file(path, text_key)
    elif _reader_of(path) is not None or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        # Never ask a server for what was evidently meant as a path.
        raise ConfigError(f"There is no file or folder {name}.")
    else:
        yield from _read_hub_dataset(name, text_key)


def _reader_of(path: Path) -> Callable[[Path, str], Iterator[str]] | None:
    for suffix, reader in _READERS.items():
        if path.name.endswith(suffix):
            return reader
    return None


def _read_file(path: Path, text_key: str) -> Iterator[str]:
    reader = _reader_of(path)
    if reader is None:
        raise ConfigError(
            f"{path} is of no kind that can be read; its name should end in one of "
            f"{', '.join(_READERS)}."
        )
    try:
        yield from reader(path, text_key)
    except OSError as error:  # also gzip.BadGzipFile
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _text_of(value: object, text_key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: field {text_key!r} holds {type(value).__name__}, not text. Name another "
            "field with --text-key or mend the input."
        )
    return value


def _parse_lines(lines: Iterator[bytes], path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
            raise ConfigError(f"{where} is not valid JSON: {error}.") from error
        if not isinstance(record, dict) or text_key not in record:
            has = ", ".join(map(repr, record)) if isinstance(record, dict) else "no fields at all"
            raise ConfigError(
                f"{where} has no field {text_key!r} (it has {has}). Name the field that holds the "
                "text with --text-key."
            )
        yield _text_of(record[text_key], text_key, where)


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    with path.open("rb") as file:
        yield from _parse_lines(iter(file), path, text_key)


def _read_jsonl_gz(path: Path, text_key: str) -> Iterator[str]:
    try:
        with gzip.open(path, "rb") as file:
            yield from _parse_lines(iter(file), path, text_key)
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is a damaged or truncated gzip file: {error}.") from error


def _read_jsonl_zst(path: Path, text_key: str) -> Iterator[str]:
    with path.open("rb") as file:
        yield from _parse_lines(_zst_lines(file, path), path, text_key)


def _zst_lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Lines of a file of one or more zstandard frames.

    zstandard's own stream reader takes a truncated file for a complete one, so frames are followed
    here: a file that ends inside one is an error.
    """
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = context.decompressobj()
    inside, rest = False, b""
    try:
        while chunk := file.read(_CHUNK_BYTES):
            while chunk:
                inside = True
                *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
                yield from lines
                chunk = b""
                if frame.eof:
                    chunk, inside = frame.unused_data, False
                    frame = context.decompressobj()
    except zstandard.ZstdError as error:
        raise ConfigError(f"{path} is a damaged zstandard file: {error}.") from error
    if inside:
        raise ConfigError(f"{path} is a truncated zstandard file: it ends inside a frame.")
    if rest:
        yield rest


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise ConfigError(
                    f"{path} has no column {text_key!r} (it has "
                    f"{', '.join(map(repr, file.schema_arrow.names))}). Name the column that holds "
                    "the text with --text-key."
                )
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text_of(value, text_key, f"{path}, row {row}")
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is not a parquet file that can be read: {error}.") from error


def _read_txt(path: Path, text_key: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from error
    if text.strip():
        yield text


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".jsonl.zst": _read_jsonl_zst,
    ".json": _read_jsonl,
    ".json.gz": _read_jsonl_gz,
    ".json.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _rows(dataset, where: str, text_key: str) -> Iterator[str]:
    columns = dataset.column_names
    if columns is not None:
        if text_key not in columns:
            raise ConfigError(
                f"{where} has no column {text_key!r} (it has {', '.join(map(repr, columns))}). "
                "Name the column that holds the text with --text-key."
            )
        dataset = dataset.select_columns([text_key])
    row = 0
    try:
        for record in dataset:
            row += 1
            if text_key not in record:
                raise ConfigError(f"{where}, row {row} has no field {text_key!r}; see --text-key.")
            yield _text_of(record[text_key], text_key, f"{where}, row {row}")
    except ConfigError:
        raise
    except Exception as error:  # the network, a damaged shard: many kinds
        raise ConfigError(f"{where} cannot be read beyond row {row}: {error}.") from error


def _read_saved_dataset(path: Path, text_key: str) -> Iterator[str]:
    """A folder written by `save_to_disk`; of several splits the one named `train`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise ConfigError(f"The data set in {path} cannot be loaded: {error}.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ConfigError(
                f"{path} holds the splits {', '.join(loaded)} but no `train`; give the folder of "
                "one split."
            )
        loaded = loaded["train"]
    yield from _rows(loaded, str(path), text_key)


def _read_hub_dataset(name: str, text_key: str) -> Iterator[str]:
    """`NAME[:CONFIG[:SPLIT]]`, streamed: nothing but the part in hand is downloaded."""
    import datasets

    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    logger.info("%s is no file here; asking for the Hugging Face data set of that name", name)
    try:
        dataset = datasets.load_dataset(
            repository, config or None, split=split or "train", streaming=True
        )
    except Exception as error:  # network, unknown name, unknown split: many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name} is neither a file or folder here nor a Hugging Face data set that can be "
            f"loaded ({reason}). Write data sets as NAME[:CONFIG[:SPLIT]]."
        ) from error
    yield from _rows(dataset, name, text_key)
