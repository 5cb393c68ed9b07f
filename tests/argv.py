"""Command lines of tests: a common part, and what one test has otherwise."""

from __future__ import annotations

from collections.abc import Iterable


def later_wins(words: Iterable[str]) -> list[str]:
    """A command line in which each flag stands once, as it was given last.

    The command itself refuses a flag that is given twice.
    """
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word.split("=")[0].removeprefix("--no-").removeprefix("--").replace("_", "-")
            found.pop(name, None)
        found.setdefault(name, []).append(word)
    return [word for part in found.values() for word in part]
