"""Read YAML from untrusted files: mappings, lists and text, nothing else of YAML.

Text stays as written: the option parses `1e-3`, `010`, `1:30` and `on`, not YAML 1.1. Anchors,
aliases and tags are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import yaml

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_text

MAX_BYTES = 2**18
"""No hand-written file is larger, and parsing a larger one would take seconds."""
MAX_DEPTH = 16
"""More nesting than any file read here needs."""


class Mapping(dict[str, "Value"]):
    """A mapping, with the line (from 1) of each key."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


Value = Union[None, str, list["Value"], Mapping]  # noqa: UP007 (a name in quotes)
"""A parsed value; `null`, `~` and an empty value are None."""


def read_yaml(path: str | Path) -> Value:
    """Read a YAML file.

    Raises:
        FileNotFoundError: the file does not exist. The caller decides what that means.
        ConfigError: it cannot be read, has a duplicate key, or uses unsupported YAML features.
    """
    text = read_text(path, max_bytes=MAX_BYTES)
    try:
        return _Reader(text, str(path)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not YAML{where}: {error.problem}.") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error


class _Reader:
    """Builds values from parser events, so that every event is checked before it is used."""

    def __init__(self, text: str, path: str) -> None:
        # Prefer libyaml: milliseconds instead of seconds.
        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
        self._events = yaml.parse(text, Loader=loader)
        self._path = path

    def document(self) -> Value:
        """Parse the only document."""
        value: Value = None
        number = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                number += 1
                if number > 1:
                    raise self._error(event, "a second document begins; only one is allowed")
                value = self._value(next(self._events), 0)
        return value

    def _value(self, event: Any, depth: int) -> Value:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._error(
                event, "anchors and aliases (& and *) are not supported; write the value out"
            )
        if event.tag is not None:
            raise self._error(event, "tags (!) are not supported; leave the tag out")
        if depth > MAX_DEPTH:
            raise self._error(event, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent):
            nothing = event.implicit[0] and event.value in ("", "~", "null", "Null", "NULL")
            return None if nothing else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(event, depth + 1))
            return items
        found = Mapping()
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = _line(event)
            key = self._value(event, depth) if isinstance(event, yaml.ScalarEvent) else None
            if not isinstance(key, str):
                raise self._error(event, "a key must be text")
            if key in found:
                first = found.lines[key]
                raise self._error(event, f"the key {key} was already given in line {first}")
            found[key] = self._value(next(self._events), depth + 1)
            found.lines[key] = line
        return found

    def _error(self, event: Any, what: str) -> ConfigError:
        return ConfigError(f"{self._path} in line {_line(event)}: {what}.")


def _line(event: Any) -> int:
    return event.start_mark.line + 1


def read_lines(what: str, path: str, form: str) -> Mapping:
    """Read a file of lines `KEY: VALUE`.

    Args:
        what: flag and file, for messages.
        path: the file.
        form: how its lines look, for messages.

    Raises:
        ConfigError: the file cannot be read, or has other content or none.
    """
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: there is no file {path}.") from error
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{what} must be lines of {form}.")
    return content
