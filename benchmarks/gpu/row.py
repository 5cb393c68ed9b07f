"""A row of the table: what was measured, what it should be, and whether it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "MISSED", "shown", "not run"]


@dataclass(frozen=True)
class Bound:
    """What a value has to be."""

    relation: Literal["<=", ">=", "="]
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a value is within; nan never is."""
        if math.isnan(value):
            return False
        if self.relation == "=":
            return value == self.limit
        return value <= self.limit if self.relation == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


def at_most(limit: float) -> Bound:
    """A bound from above."""
    return Bound("<=", limit)


def at_least(limit: float) -> Bound:
    """A bound from below."""
    return Bound(">=", limit)


def exactly(limit: float) -> Bound:
    """One value."""
    return Bound("=", limit)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    number: int
    """In the table of docs/first-gpu-run.md."""
    what: str
    state: State
    value: float | str | None = None
    bound: Bound | None = None
    note: str = ""

    @classmethod
    def measured(
        cls,
        number: int,
        what: str,
        value: float | bool,
        bound: Bound | None = None,
        note: str = "",
    ) -> Row:
        """A value, with its bound if it has one."""
        value = float(value)
        within = bound is None or bound.holds(value)
        state: State = "shown" if bound is None else "ok" if within else "MISSED"
        return cls(number, what, state, value, bound, note)

    @classmethod
    def fact(cls, number: int, what: str, value: str) -> Row:
        """Something in words that has no bound."""
        return cls(number, what, "shown", value)

    @classmethod
    def failed(cls, number: int, what: str, why: str) -> Row:
        """What could not be measured though it should have been."""
        return cls(number, what, "MISSED", note=why)

    @classmethod
    def not_run(cls, number: int, what: str, why: str) -> Row:
        """What this machine cannot show."""
        return cls(number, what, "not run", note=why)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that JSON does not know are text."""
        plain = asdict(self) | {"bound": None if self.bound is None else str(self.bound)}
        if isinstance(self.value, float) and not math.isfinite(self.value):
            plain["value"] = str(self.value)
        return plain

    def __str__(self) -> str:
        value = self.value
        if isinstance(value, float):
            value = f"{value:.4g}"
        cells = (self.number, self.what, value, self.bound, self.state, self.note)
        return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


TABLE_HEAD = "| row | what | value | bound | | note |\n|--:|---|--:|--:|---|---|"


def missed(rows: Iterable[Row]) -> list[Row]:
    """Those whose bound does not hold, or that could not be measured."""
    return [row for row in rows if row.state == "MISSED"]
