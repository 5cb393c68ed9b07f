"""Check the fields of a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pydantic

from megatron_eslm.errors import ConfigError

FIELDS = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
"""How a schema of config.json reads: fields that do not affect the computation are ignored."""


def unsupported(field: str, value: Any, wanted: str, reason: str) -> ConfigError:
    """Build the error for a field with a value that cannot be converted."""
    return ConfigError(
        f"The Hugging Face model has {field} = {value!r}; supported is {wanted} ({reason}). "
        "Such a model cannot be converted; use one with the supported setting."
    )


def check_fixed(fields: object, fixed: Mapping[str, tuple[Any, str]]) -> None:
    """Raise ConfigError unless the fields have their only supported values, given with reasons."""
    for field, (value, reason) in fixed.items():
        if getattr(fields, field) != value:
            raise unsupported(field, getattr(fields, field), json.dumps(value), reason)
    if getattr(fields, "quantization_config", None) is not None:
        raise unsupported(
            "quantization_config", "{...}", "none", "weights must be floating-point numbers"
        )
