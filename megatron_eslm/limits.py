"""What the value of an option may be, stated in its annotation and checked in one place.

    lr: Annotated[float, NOT_NEGATIVE] | None = None

An option dataclass calls `check_fields(self)` first in its `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from megatron_eslm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where a number lies: above a bound, or between two."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    why: str = ""
    """What the number is or what others use, for the message."""

    def refusal(self, value: float) -> str | None:
        """What is wrong with a value, or None."""
        fits = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        if fits:
            return None
        return f"{self._demand()}: {self.why}" if self.why else self._demand()

    def _demand(self) -> str:
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        assert low is not None
        if high is not None:
            opening = "[" if self.above is None else "("
            closing = "]" if self.below is None else ")"
            return f"is outside {opening}{low:.16g}, {high:.16g}{closing}"
        return f"must be {low:g} or more" if self.above is None else f"must be above {low:g}"


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
ONE_OR_MORE = Range(at_least=1)
BELOW_ONE = Range(at_least=0, below=1)


@dataclass(frozen=True)
class Commas:
    """The option's text is values between commas; a YAML file may give them as a list."""


@dataclass(frozen=True, eq=False)
class Among:
    """The option's text is one of these names, to which others may be added until it is read."""

    names: Collection[str]


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How an option is written on the command line where that is not `--its-name VALUE`."""

    positional: bool = False
    """Without a flag."""
    repeated: bool = False
    """Each of its values has a flag of its own, and is any text, also an empty one."""
    metavar: str | None = None
    """What stands for a value in the help; default: its type."""
    also: str | None = None
    """A second name of the flag."""


def flag_of(name: str) -> str:
    """`--num-layers` for `num_layers`; DeepSpeed's own flag keeps its underscore."""
    return "--deepspeed_config" if name == "deepspeed_config" else f"--{name.replace('_', '-')}"


def check_fields(options: Any) -> None:
    """Check each field of an option dataclass by itself.

    Numbers are finite, whole ones fit into 64 bits, and both lie in the `Range` of their
    annotation. Text is neither empty nor has NUL characters, of which no path can be made.

    Raises:
        ConfigError: names the flag.
    """
    kind: Any = type(options)
    for name, limits in _ranges(kind).items():
        value = getattr(options, name)
        for part in value if isinstance(value, tuple) else (value,):
            wrong = _refusal(part, limits)
            if wrong is not None:
                raise ConfigError(f"{flag_of(name)} {wrong}.")


def _refusal(value: Any, limits: Range | None) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        if not value:
            return "is empty; give it a value, or leave it out"
        return f"{value!r} has a NUL character in it" if "\0" in value else None
    if not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    wrong = limits.refusal(value) if limits is not None else None
    if wrong is None and not -(2**63) <= value < 2**63:
        wrong = "is too large"
    shown = value if isinstance(value, int) else f"{value:.16g}"
    return f"{shown} {wrong}" if wrong is not None else None


@functools.cache
def _ranges(cls: type) -> dict[str, Range | None]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: metadata(hints[field.name], Range)
        for field in dataclasses.fields(cls)
        if not (metadata(hints[field.name], Flag) or Flag()).repeated
    }


def metadata(annotation: Any, kind: type) -> Any:
    """The object of type `kind` in an annotation, wherever in it; None if there is none."""
    for part in (*getattr(annotation, "__metadata__", ()), *typing.get_args(annotation)):
        found = part if isinstance(part, kind) else metadata(part, kind)
        if found is not None:
            return found
    return None
