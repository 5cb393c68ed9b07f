"""JSON from files that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.regular import open_regular

MAX_BYTES = 2**28
"""No file of ours comes near; a larger one is not what its name says."""


def read_json(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file.

    Args:
        path: a regular file of UTF-8 text.
        max_bytes: a larger file is refused before it is read.

    Raises:
        FileNotFoundError: nothing is there. The caller knows what that means.
        ConfigError: it cannot be read, or is not JSON in the sense of `parse_json`.
    """
    return parse_json(read_text(path, max_bytes=max_bytes), str(path))


def read_text(path: str | Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a regular UTF-8 file; errors as in `read_json`."""
    with open_regular(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > max_bytes:
        raise ConfigError(
            f"{path} has more than {max_bytes} bytes, too many for what it should be."
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Args:
        text: the text.
        where: its file (and line), for messages.

    Raises:
        ConfigError: not JSON, an object with a key twice, or nested too deep for Python.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ConfigError(f"{where} is not JSON that can be read: nested too deep.") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise ConfigError(f"{where} is not JSON: {error}.") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is given twice")
    return values
