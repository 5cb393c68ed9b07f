"""What became of each injected fault, counted by part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Verdict(str, Enum):
    """How a run took a fault."""

    SURVIVED = "survived"
    """It ended as the uninterrupted run did, bit for bit."""
    REFUSED = "refused by name"
    """It ended with exit code 2 and one paragraph, having changed nothing."""
    LOST = "lost"
    """It ended otherwise, hung, left a process behind, or could not be continued."""
    SILENT = "silent"
    """It went on as if nothing were wrong and its results differ."""
    TRACEBACK = "traceback"
    """It ended with a Python traceback."""


GOOD = (Verdict.SURVIVED, Verdict.REFUSED)


@dataclass
class Table:
    """Verdicts by part of the system."""

    counts: dict[str, Counter[Verdict]] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def add(self, part: str, verdict: Verdict, what: str = "", times: int = 1) -> None:
        """Count a fault; `what` is said of those that did not end well."""
        self.counts.setdefault(part, Counter())[verdict] += times
        if verdict not in GOOD and times:
            self.complaints.append(f"{part}: {verdict.value}: {what}")

    @property
    def good(self) -> bool:
        """Whether every fault was survived or refused by name."""
        return not self.complaints

    def text(self) -> str:
        """A Markdown table, and below it whatever did not end well."""
        head = ["part", "cases", *(verdict.value for verdict in Verdict)]
        lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
        total: Counter[Verdict] = Counter()
        for part, counts in self.counts.items():
            total += counts
            lines.append(_row(part, counts))
        lines.append(_row("all", total))
        return "\n".join([*lines, *(f"\n{complaint}" for complaint in self.complaints)])


def _row(name: str, counts: Counter[Verdict]) -> str:
    cells = [name, counts.total(), *(counts[verdict] for verdict in Verdict)]
    return f"| {' | '.join(map(str, cells))} |"
