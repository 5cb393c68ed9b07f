"""Two or more runs side by side: what each reached, and what it took to get there.

Following the rule of how savings are believed, tokens read, tokens trained on, FLOPs executed,
FLOPs as the paper counts them and wall-clock each have a row of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.runs import Record, Run

if TYPE_CHECKING:
    from rich.table import Table

NO_CONTROL = (
    "no random-selection control among these runs: a gain here cannot be told from dropping the "
    "same share at random"
)

_PLACES = {"save", "metrics_file", "dump_selection", "data_cache_path"}
"""Settings that say where a run wrote, which never makes two runs differ."""

Relative = Literal["ratio", "difference", "none"]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Row:
    """One quantity of every run, in the order of the runs."""

    name: str
    values: list[float | None]
    """None: not measured, or (in a `to target` row) never reached."""

    form: Format
    relative: Relative = "ratio"
    """How a value stands to the first run's."""

    absent: list[str] | None = None
    """What to print for each None; default: "n/a"."""

    def cell(self, column: int) -> str:
        """The value of one run as text, with how it stands to the first run's."""
        value, first = self.values[column], self.values[0]
        if value is None:
            return self.absent[column] if self.absent else "n/a"
        text = self.form(value)
        if column == 0 or first is None or not math.isfinite(value - first):
            return text
        if self.relative == "difference":
            return f"{text} ({'+' if value >= first else '-'}{self.form(abs(value - first))})"
        if self.relative == "ratio" and first:
            return f"{text} ({value / first:.2f}x)"
        return text


@dataclass(frozen=True)
class Comparison:
    """The whole table, before it is drawn."""

    labels: list[str]
    rows: list[Row]
    target: float
    notes: list[str] = field(default_factory=list)


def compare(runs: Sequence[Run], labels: Sequence[str], target: float | None = None) -> Comparison:
    """Compare runs; relative numbers refer to the first.

    Args:
        runs: two or more.
        labels: one for each.
        target: validation loss (nats) of the "to target" rows; default: the worst final validation
            loss among the runs, which all of them reach.

    Raises:
        ConfigError: fewer than two runs, another number of labels, or a run without evaluation.
    """
    if len(runs) < 2:
        raise ConfigError(f"{len(runs)} run given; a comparison needs two or more metrics files.")
    if len(labels) != len(runs):
        raise ConfigError(
            f"--labels names {len(labels)} runs, but there are {len(runs)}; give one for each."
        )
    for run in runs:
        if not run.evaluations:
            raise ConfigError(
                f"The metrics file {run.path} has no valid_loss, so there is nothing to compare. "
                "Train with --eval-interval below the number of iterations."
            )
    if target is None:
        target = common_target(runs)
    rows = [*_result_rows(runs), *_cost_rows(runs), *_target_rows(runs, target)]
    return Comparison(list(labels), rows, target, _notes(runs))


def common_target(runs: Sequence[Run]) -> float:
    """The worst final validation loss: every run that ended with a finite loss reaches it."""
    finals = [run.evaluations[-1]["valid_loss"] for run in runs]
    finite = [loss for loss in finals if math.isfinite(loss)]
    if not finite:
        raise ConfigError("No run ended with a finite validation loss; give --target.")
    return max(finite)


def first_reach(evaluations: Sequence[Record], name: str, target: float) -> float | None:
    """Where a run first reaches a validation loss, linear between evaluations.

    Args:
        evaluations: records with `valid_loss`, in order.
        name: the quantity to read off, for instance "flops".
        target: validation loss, nats.

    Returns:
        The quantity at that point; None if the loss is never reached or the quantity is missing.
    """
    before: Record | None = None
    for record in evaluations:
        loss = record["valid_loss"]
        if loss <= target:
            if record.get(name) is None:
                return None
            if before is None or before.get(name) is None:
                return float(record[name])
            share = (before["valid_loss"] - target) / (before["valid_loss"] - loss)
            return float(before[name] + share * (record[name] - before[name]))
        # NaN and infinity are no end of a line to interpolate on.
        before = record if math.isfinite(loss) else None
    return None


def to_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table with its notes below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    columns = range(len(comparison.labels))
    lines = [
        line(["", *comparison.labels]),
        "|---|" + "---:|" * len(comparison.labels),
        *(line([row.name, *map(row.cell, columns)]) for row in comparison.rows),
        *(f"\n{line_below}" for line_below in lines_below(comparison)),
    ]
    return "\n".join(lines) + "\n"


def to_console(comparison: Comparison) -> Table:
    """The comparison as a rich table; `lines_below` goes with it."""
    from rich.table import Table
    from rich.text import Text

    # Text, not str: square brackets in a label are no markup.
    table = Table()
    table.add_column("")
    for label in comparison.labels:
        table.add_column(Text(label), justify="right")
    for row in comparison.rows:
        cells = (row.cell(column) for column in range(len(comparison.labels)))
        table.add_row(row.name, *map(Text, cells))
    return table


def lines_below(comparison: Comparison) -> list[str]:
    """How to read the table, and what there is to say about it; a line each."""
    reading = (
        f"Target validation loss: {comparison.target:.4f}. In brackets: against "
        f"{comparison.labels[0]} (ratio; for losses and skipped steps the difference)."
    )
    return [reading, *comparison.notes]


def _result_rows(runs: Sequence[Run]) -> list[Row]:
    return [
        Row(
            "final validation loss",
            [run.evaluations[-1]["valid_loss"] for run in runs],
            "{:.4f}".format,
            "difference",
        ),
        Row(
            "best validation loss",
            [best_loss(run) for run in runs],
            "{:.4f}".format,
            "difference",
        ),
    ]


def best_loss(run: Run) -> float | None:
    """The lowest finite validation loss of a run."""
    losses = [r["valid_loss"] for r in run.evaluations if math.isfinite(r["valid_loss"])]
    return min(losses, default=None)


def _cost_rows(runs: Sequence[Run]) -> list[Row]:
    def totals(name: str) -> list[float | None]:
        return [run.last(name) for run in runs]

    def means(name: str) -> list[float | None]:
        return [run.mean(name) for run in runs]

    return [
        Row("iterations", totals("iteration"), _count),
        Row("tokens read", totals("tokens"), _count),
        Row("tokens trained on", totals("tokens_trained"), _count),
        Row("FLOPs executed", totals("flops"), "{:.3e}".format),
        Row("FLOPs, paper's count", totals("flops_paper"), "{:.3e}".format),
        Row("wall-clock seconds", totals("elapsed_seconds"), _seconds),
        Row("mean step seconds", means("step_seconds"), "{:.4g}".format),
        Row("kept instances, mean", means("kept_instances"), "{:.4f}".format, "none"),
        Row("kept tokens, mean", means("kept_tokens"), "{:.4f}".format, "none"),
        Row("skipped steps", totals("nonfinite_steps"), _count, "difference"),
    ]


def _target_rows(runs: Sequence[Run], target: float) -> list[Row]:
    reached = [any(r["valid_loss"] <= target for r in run.evaluations) for run in runs]
    absent = ["n/a" if hit else "not reached" for hit in reached]

    def row(what: str, name: str, form: Format) -> Row:
        values = [first_reach(run.evaluations, name, target) for run in runs]
        return Row(f"{what} to target", values, form, absent=absent)

    return [
        row("iterations", "iteration", "{:,.1f}".format),
        row("FLOPs executed", "flops", "{:.3e}".format),
        row("FLOPs, paper's count", "flops_paper", "{:.3e}".format),
        row("wall-clock seconds", "elapsed_seconds", _seconds),
    ]


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    different = differing_settings(runs)
    if different:
        notes.append(f"settings that differ: {'; '.join(different)}")
    if not any(run.settings.get("selection") == "random" for run in runs):
        notes.append(NO_CONTROL)
    return notes


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The settings in which the runs differ, with each run's value ("-" where it is not said)."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _PLACES)
    told: list[str] = []
    for name in names:
        values = [_short(run.settings.get(name)) for run in runs]
        if len(set(values)) > 1:
            told.append(f"{name} = {', '.join(values)}")
    return told


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"
