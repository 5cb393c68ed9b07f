"""Read the metrics file (JSON lines) that `--metrics-file` writes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import parse_json
from megatron_eslm.files.regular import open_regular

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""One metrics line: numbers, None where nothing was measured, and the fields `_BY_DOMAIN` as dicts
of numbers."""

_BY_DOMAIN = ("valid_loss_by_domain", "test_loss_by_domain")


TASKS = "tasks/"
"""Start of the fields `tasks/NAME/METRIC`, results of tasks."""


@dataclass(frozen=True)
class Run:
    """One training run, oldest line first, every iteration once."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """Content of the `{"run": {...}}` line; empty if there is none."""

    records: list[Record] = field(default_factory=list)
    """Metrics lines in order of iteration. Every record has `iteration` and `elapsed_seconds`
    (training time so far, without evaluation and saving; None if it cannot be known)."""

    evaluated: list[Record] = field(default_factory=list)
    """Results of `tools/evaluate.py`, in order of iteration: `iteration`, `flops` and
    `tasks/NAME/METRIC`."""

    @property
    def iterations(self) -> int:
        """Last iteration of the run."""
        return self.records[-1]["iteration"]

    @property
    def evaluations(self) -> list[Record]:
        """Records with a validation loss (which may be NaN in a broken run)."""
        return [r for r in self.records if r.get("valid_loss") is not None]

    @property
    def task_records(self) -> list[Record]:
        """Records with results of tasks: `evaluated`, else those of `--eval-tasks`."""
        during = [r for r in self.records if any(name.startswith(TASKS) for name in r)]
        return self.evaluated or during

    def last(self, name: str) -> float | None:
        """The last value of a running total, or None."""
        return next(
            (r[name] for r in reversed(self.records) if r.get(name) is not None),
            None,
        )

    def mean(self, name: str) -> float | None:
        """The mean of a per-step quantity, each line weighted by the iterations it stands for."""
        total, weight, before = 0.0, 0, 0
        for record in self.records:
            steps = record["iteration"] - before
            before = record["iteration"]
            value = record.get(name)
            if value is not None and math.isfinite(value) and steps > 0:
                total += value * steps
                weight += steps
        return total / weight if weight else None


def read_run(path: str | Path) -> Run:
    """Read a metrics file.

    A resumed run writes some iterations twice, and the last line counts: a line replaces all
    earlier lines of the same or a later iteration, because the resumed run repeated these.

    Args:
        path: JSON lines, the first of them possibly `{"run": {...settings...}}`.

    Raises:
        ConfigError: the file is missing or has no metrics, or a line is broken (file:line). Only a
            broken last line, as left by a killed run, is skipped with a warning; the line before
            the `{"run": ...}` line of a resumed run also counts as last.
    """
    path = Path(path)
    settings: dict[str, Any] = {}
    records: list[Record] = []
    for item in _items(path):
        if "run" in item:
            settings = item["run"]
            continue
        while records and records[-1]["iteration"] >= item["iteration"]:
            records.pop()
        records.append(item)
    if not records:
        raise ConfigError(
            f"The metrics file {path} holds no metrics. Give the file of a run that got at least "
            "to its first --log-interval."
        )
    return Run(path, settings, _with_elapsed(records))


def _items(path: Path) -> list[Record]:
    """Parse all complete lines; ConfigError for a broken line not explained by a killed run."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, ConfigError) as error:
        why = f"{path}: {error.strerror}." if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"A metrics file cannot be read. {why} Give the file that the run wrote with "
            "--metrics-file."
        ) from error
    lines = [(n, s) for n, s in enumerate(content.splitlines(), 1) if s.strip()]
    items: list[Record] = []
    torn: ConfigError | None = None
    for number, line in lines:
        try:
            item = _parse(line)
        except ValueError as error:
            if torn:
                raise torn from error
            torn = ConfigError(
                f"{path}:{number}: {error}. The file is damaged there; repair or remove the line."
            )
            continue
        if torn and "run" not in item:
            raise torn
        if torn:
            logger.warning("skipped an incomplete line, as left by a killed run: %s", torn)
            torn = None
        items.append(item)
    if torn and content.endswith(b"\n"):
        raise torn  # a killed run leaves no line end
    if torn:
        logger.warning("skipped the incomplete last line, as left by a killed run: %s", torn)
    return items


def _parse(line: bytes) -> Record:
    """Parse one line as a record or `{"run": {...}}`; raise ValueError if it is invalid."""
    item = parse_json(line, "the line")
    if not isinstance(item, dict):
        raise ValueError("not a JSON object")
    if "run" in item:
        _check_settings(item["run"])
        return item
    iteration = item.get("iteration")
    if type(iteration) is not int or not 0 <= iteration < 2**63:
        raise ValueError('no "iteration" that is a whole number')
    for name, value in item.items():
        parts = value if name in _BY_DOMAIN and isinstance(value, dict) else {"": value}
        for part, number in parts.items():
            if number is not None and not _is_number(number):
                where = name + (f"/{part}" if part else "")
                raise ValueError(f'"{where}" is {_short(number)}, not a number')
    return item


def _check_settings(settings: Any) -> None:
    """Raise ValueError if seed or selection, which distinguish runs, are invalid."""
    if not isinstance(settings, dict):
        raise ValueError('"run" does not hold settings')
    seed, selection = settings.get("seed"), settings.get("selection")
    if not (seed is None or type(seed) is int):
        raise ValueError(f'"run/seed" is {_short(seed)}, not a whole number')
    if not (selection is None or isinstance(selection, str)):
        raise ValueError(f'"run/selection" is {_short(selection)}, not a name')


def _is_number(value: Any) -> bool:
    """Whether tables and curves can show the value; excludes huge integers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**1000


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _with_elapsed(records: list[Record]) -> list[Record]:
    """Fill in `elapsed_seconds`; where it is missing, sum step times."""
    elapsed: float | None = 0.0
    before = 0
    complete = []
    for record in records:
        steps = record["iteration"] - before
        before = record["iteration"]
        known = record.get("elapsed_seconds")
        step_seconds = record.get("step_seconds")
        if known is not None:
            elapsed = known
        elif elapsed is not None and step_seconds is not None:
            elapsed += step_seconds * steps
        elif steps:
            elapsed = None
        complete.append({**record, "elapsed_seconds": elapsed})
    return complete
