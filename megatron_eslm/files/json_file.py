"""Read JSON from untrusted files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.regular import open_regular

MAX_BYTES = 2**28
"""Far larger than any JSON file this package reads; anything larger is something else."""


def read_json(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Read the value in a JSON file.

    Args:
        path: a regular file of UTF-8 text.
        max_bytes: size limit; a larger file is refused.

    Raises:
        FileNotFoundError: the file does not exist. The caller decides what that means.
        ConfigError: it cannot be read, is too large, or is not JSON (see `parse_json`).
    """
    return parse_json(read_text(path, max_bytes=max_bytes), str(path))


def read_text(path: str | Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Read a regular UTF-8 file; errors as in `read_json`."""
    with open_regular(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > max_bytes:
        raise ConfigError(
            f"{path} has more than {max_bytes} bytes, too many for a file of its kind."
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse a JSON text.

    Args:
        text: the JSON text.
        where: its file (and line), for messages.

    Raises:
        ConfigError: not JSON, a duplicate key in an object, or nested too deep for Python.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ConfigError(f"{where} is not readable JSON: nested too deep.") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise ConfigError(f"{where} is not JSON: {error}.") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is given twice")
    return values
