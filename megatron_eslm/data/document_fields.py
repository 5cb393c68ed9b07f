"""Which fields of a record make a document: its text, and what names its domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_eslm.data.bad_lines import text_of
from megatron_eslm.errors import ConfigError


class Document(NamedTuple):
    """One document of an input."""

    text: str
    domain: str = ""
    """Value of `--split-key`, as in the input; "" without one."""


@dataclass(frozen=True, kw_only=True)
class DocumentFields:
    """Names of the fields to read."""

    text_key: str = "text"
    split_key: str | None = None
    """Field that names the domain; dots lead into nested objects. None: there is one domain."""

    @property
    def columns(self) -> list[str]:
        """Top-level fields needed."""
        return list(dict.fromkeys([self.text_key, *self._path[:1]]))

    @property
    def _path(self) -> list[str]:
        return self.split_key.split(".") if self.split_key is not None else []

    def document(self, record: Mapping[str, Any], where: str) -> Document:
        """The document in a record that has the field `text_key`.

        Args:
            record: field to value.
            where: file and line or row, for messages.

        Raises:
            ConfigError: a field is missing or not text.
        """
        text = text_of(record[self.text_key], self.text_key, where)
        if self.split_key is None:
            return Document(text)
        value: Any = record
        for key in self._path:
            if not isinstance(value, Mapping) or key not in value:
                has = ", ".join(map(repr, value)) if isinstance(value, Mapping) else "no fields"
                raise ConfigError(
                    f"{where} has no field {self.split_key!r} (at {key!r} there is: {has}). Name "
                    "the field that holds the domain with --split-key."
                )
            value = value[key]
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{where}: field {self.split_key!r} holds {value!r}, not a name. Name another "
                "field with --split-key or fix the input."
            )
        return Document(text, value)

    def whole_file(self, text: str, name: str) -> Document:
        """The document that a file without fields holds.

        Raises:
            ConfigError: its domain is asked for.
        """
        if self.split_key is not None:
            raise ConfigError(
                f"{name} has no fields, so there is no {self.split_key!r} in it. Leave it out, or "
                "preprocess it without --split-key."
            )
        return Document(text)
