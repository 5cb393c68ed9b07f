"""Read JSON lines, compressed or not: one object per line, with the text in one of its fields."""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from megatron_eslm.data.bad_lines import BadLines
from megatron_eslm.data.document_fields import Document, DocumentFields
from megatron_eslm.errors import ConfigError

_LIBRARIES = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}

COMPRESSIONS = ("", *_LIBRARIES, ".zst")
"""Suffixes that `decompressed` supports."""

_CHUNK_BYTES = 1 << 17
_TWICE = object()


def read_json_lines(
    lines: Iterable[bytes], name: str, fields: DocumentFields, bad: BadLines
) -> Iterator[Document]:
    """Yield the document of each line, skipping empty lines.

    A duplicate text field is an error. For other duplicate fields the last value counts, as in most
    JSON readers.

    Args:
        lines: UTF-8, with or without a byte order mark.
        name: the file, for messages.
        fields: fields that make a document.
        bad: handles the errors about single lines.

    Raises:
        ConfigError: raised by `bad`, or all lines are bad, whatever its policy.
    """
    decoder = _decoder(fields.text_key)
    any_good, bad_here, first = False, 0, ""
    for number, line in enumerate(lines, start=1):
        if not (stripped := line.strip()):
            continue
        if number == 1 and (stripped.startswith(b"[") or stripped == b"{"):
            raise ConfigError(
                f"{name} begins like a single JSON value; expected JSON lines, one object per "
                "line. `jq -c '.[]' FILE` converts an array."
            )
        try:
            document = _document_of_line(line, decoder, fields, f"{name}, line {number}")
        except ConfigError as error:
            bad.found(error)
            bad_here, first = bad_here + 1, first or str(error)
            continue
        any_good = True
        yield document
    if bad_here and not any_good:
        raise ConfigError(f"{name}: all lines are bad ({bad_here}). The first: {first}")


def _decoder(text_key: str) -> json.JSONDecoder:
    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs) and [key for key, _ in pairs].count(text_key) > 1:
            values[text_key] = _TWICE
        return values

    # parse_int=float: a number with thousands of digits is no reason to refuse a document.
    return json.JSONDecoder(object_pairs_hook=fields, parse_int=float)


def _document_of_line(
    line: bytes, decoder: json.JSONDecoder, fields: DocumentFields, where: str
) -> Document:
    text_key = fields.text_key
    try:
        record = decoder.decode(line.decode("utf-8-sig", "surrogatepass"))
    except RecursionError:
        raise ConfigError(f"{where} is nested too deep to be read.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text: {error}.") from error
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where} is not a JSON object (it has no fields).")
    if text_key not in record:
        raise ConfigError(
            f"{where} has no field {text_key!r} (it has {', '.join(map(repr, record))}). Name the "
            "field that holds the text with --text-key."
        )
    if record[text_key] is _TWICE:
        raise ConfigError(f"{where} gives the field {text_key!r} twice.")
    return fields.document(record, where)


def decompressed(file: IO[bytes], name: str, compression: str) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed.

    Args:
        file: open at its start.
        name: the file, for messages.
        compression: one of `COMPRESSIONS`.

    Raises:
        ConfigError: (while iterating) it is damaged or ends too early.
        OSError: (while iterating) the disk fails.
    """
    if compression == ".zst":
        yield from _zst_lines(file, name)
    elif compression:
        library = importlib.import_module(_LIBRARIES[compression])
        try:
            yield from library.open(file)
        except (EOFError, OSError, zlib.error, getattr(library, "LZMAError", EOFError)) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ConfigError(
                f"{name} is a damaged or truncated {compression} file: {error}."
            ) from error
    else:
        yield from file


def _zst_lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield the lines of a file of one or more zstandard frames.

    Tracks frames and raises an error if the file ends inside one; zstandard's own stream reader
    would take a truncated file for a complete one.
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
        raise ConfigError(f"{name} is a damaged zstandard file: {error}.") from error
    if inside:
        raise ConfigError(f"{name} is a truncated zstandard file: it ends inside a frame.")
    if rest:
        yield rest
