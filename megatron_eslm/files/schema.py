"""Parse JSON values into dataclasses, or raise one message with everything that does not fit.

The dataclass is the schema. Its annotations are checked strictly (no "5" for 5, no true for 1, no
unknown keys). Declare one with a class attribute:

    @dataclass(frozen=True, kw_only=True)
    class Entry:
        __pydantic_config__ = STRICT
        bytes: Count
        crc32: Count
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json

T = TypeVar("T")

STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""No type coercion, no unknown keys, finite numbers only."""

Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
"""A count that fits into 64 bits."""
Size = Annotated[int, pydantic.Field(ge=1, lt=2**31)]
"""A dimension of at least 1."""


def read_as(cls: type[T], path: str | Path) -> T:
    """Read a JSON file as `cls`.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: it cannot be read or does not fit.
    """
    return parse_as(cls, read_json(path), str(path))


def parse_as(cls: type[T], value: Any, where: str) -> T:
    """Validate a JSON value as `cls`.

    Args:
        cls: a strict dataclass, or an annotation composed of strict dataclasses.
        value: dicts, lists, text, numbers, true, false, null.
        where: its file, for messages.

    Raises:
        ConfigError: it does not fit; names file, keys and reasons.
    """
    annotation: Any = cls
    try:
        # Validate as JSON, where a list may stand for a tuple; strict Python values may not.
        return _adapter(annotation).validate_json(json.dumps(value))
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where} has invalid contents: {_reasons(error)}.") from error
    except RecursionError:
        raise ConfigError(f"{where} has invalid contents: nested too deep.") from None


@functools.cache
def _adapter(annotation: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(annotation)


def _reasons(error: pydantic.ValidationError, most: int = 3) -> str:
    """List the first errors as `key: what is wrong`."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    texts = [
        f"{'.'.join(map(str, one['loc'])) or 'top level'}: {_reason(one['msg'])}"
        for one in found[:most]
    ]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(texts) + more


def _reason(message: str) -> str:
    # pydantic prefixes errors that the dataclass itself raises with "Value error".
    own = message.removeprefix("Value error, ").rstrip(".")
    return own if own != message else message[:1].lower() + message[1:]
