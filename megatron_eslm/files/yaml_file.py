"""YAML from files that nobody vouches for: mappings, lists and text, and nothing else of YAML.

Text stays as it is written: `1e-3`, `010`, `1:30` and `on` become what the option that they are
for makes of them, not what YAML 1.1 does. There are no anchors, aliases and tags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import yaml

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_text

MAX_BYTES = 2**18
"""A larger file is none that a person has written; reading it would take seconds."""
MAX_DEPTH = 16
"""Nested deeper than anything that is read here."""


class Mapping(dict[str, "Value"]):
    """A mapping, with the line (from 1) of each key."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


Value = Union[None, str, list["Value"], Mapping]  # noqa: UP007 (a name in quotes)
"""What a file says: `null`, `~` or nothing at all is None."""


def read_yaml(path: str | Path) -> Value:
    """What a YAML file says.

    Raises:
        FileNotFoundError: nothing is there. The caller knows what that means.
        ConfigError: it cannot be read, has a key twice, or uses more of YAML than is read here.
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
    """Makes values of the parser's events: nothing is built that the checks have not seen."""

    def __init__(self, text: str, path: str) -> None:
        # libyaml where PyYAML was built with it, which takes milliseconds where Python takes
        # seconds.
        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
        self._events = yaml.parse(text, Loader=loader)
        self._path = path

    def document(self) -> Value:
        """The value of the only document."""
        value: Value = None
        number = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                number += 1
                if number > 1:
                    raise self._error(event, "a second document begins; there can be one only")
                value = self._value(next(self._events), 0)
        return value

    def _value(self, event: Any, depth: int) -> Value:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._error(event, "anchors and aliases (& and *) are not read; write it out")
        if event.tag is not None:
            raise self._error(event, "tags (!) are not read; leave it out")
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
                raise self._error(event, f"the key {key} is given in line {first} already")
            found[key] = self._value(next(self._events), depth + 1)
            found.lines[key] = line
        return found

    def _error(self, event: Any, what: str) -> ConfigError:
        return ConfigError(f"{self._path} in line {_line(event)}: {what}.")


def _line(event: Any) -> int:
    return event.start_mark.line + 1
