"""A table of text, with rendering in Markdown and on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column is the row's name, the others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    reading: str = ""
    """A sentence on how to read it."""

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.header), (self.title, row)


def to_markdown(table: Table) -> str:
    """Render the table under its title, with `reading` below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown_text(cell) for cell in cells) + " |"

    lines = [
        f"## {table.title}",
        "",
        line(table.header),
        "|---|" + "---:|" * (len(table.header) - 1),
        *map(line, table.rows),
    ]
    if table.reading:
        lines += ["", table.reading]
    return "\n".join(lines) + "\n"


def _markdown_text(text: str) -> str:
    """Escape text for a single Markdown cell."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, "\\" + character)
    return " ".join(text.splitlines())


def print_tables(tables: Iterable[Table]) -> None:
    """Write the tables to standard output, each with its reading below."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(to_console(table))
        sys.stdout.write(f"{table.reading}\n\n")


def to_console(table: Table) -> rich.table.Table:
    """Convert the table for rich; the caller prints `reading` below it."""
    from rich.table import Table as RichTable
    from rich.text import Text

    # Use Text, so that square brackets in labels are not parsed as markup.
    drawn = RichTable(title=Text(table.title), title_justify="left")
    for number, name in enumerate(table.header):
        drawn.add_column(Text(name), justify="right" if number else "left")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
