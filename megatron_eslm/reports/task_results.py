"""Read what `tools/evaluate.py --output` wrote, and join it to the runs that were evaluated."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import parse_json, read_text
from megatron_eslm.files.schema import Count, parse_as
from megatron_eslm.reports.runs import TASKS, Record, Run


@dataclass(frozen=True, kw_only=True)
class TaskLine:
    """What one checkpoint reaches in one task: a line of the file, as far as it is needed here."""

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    load: str
    iteration: Count | None
    task: str
    metrics: dict[str, float | None]
    dtype: str
    limit: Count | None
    version: str
    shots: Count
    split: str
    documents: Count
    members: list[str] = dataclasses.field(default_factory=list)
    """Tasks that it is over, if it is a group."""


_CONDITIONS = ("dtype", "limit", "version", "shots", "split", "documents")
"""What has to be equal for results of a task to be comparable."""


def read_task_results(paths: Sequence[str | Path]) -> list[tuple[str, TaskLine]]:
    """Read all lines, each with its place (file:line); those of groups, which repeat, are left out.

    Raises:
        ConfigError: a file cannot be read, a line is not of `tools/evaluate.py`, or two results of
            a task were had under different conditions.
    """
    lines = [(where, line) for path in paths for where, line in _lines(path) if not line.members]
    first: dict[str, tuple[str, TaskLine]] = {}
    for where, line in lines:
        place, other = first.setdefault(line.task, (where, line))
        for name in _CONDITIONS:
            mine, theirs = getattr(line, name), getattr(other, name)
            if mine != theirs:
                raise ConfigError(
                    f"--results: {line.task} has {name} {mine} in {where} but {theirs} in {place}, "
                    "so the two cannot be compared. Evaluate both alike, or leave one out."
                )
    return lines


def with_task_results(runs: Sequence[Run], lines: Sequence[tuple[str, TaskLine]]) -> list[Run]:
    """The runs with the results of their checkpoints.

    The last result of a checkpoint and task counts. FLOPs are those of the run at the iteration of
    the checkpoint, linear between lines of its metrics.

    Raises:
        ConfigError: a result belongs to none of the runs, or to more than one.
    """
    found: dict[int, dict[int, Record]] = {}
    for where, line in lines:
        number = _run_of(runs, line, where)
        run, iteration = runs[number], line.iteration
        assert iteration is not None
        record = found.setdefault(number, {}).setdefault(
            iteration, {"iteration": iteration, "flops": _flops_at(run, iteration)}
        )
        record.update({f"{TASKS}{line.task}/{name}": v for name, v in line.metrics.items()})
    return [
        dataclasses.replace(run, evaluated=[of[i] for i in sorted(of)])
        if (of := found.get(number))
        else run
        for number, run in enumerate(runs)
    ]


def _lines(path: str | Path) -> Iterator[tuple[str, TaskLine]]:
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise ConfigError(f"--results {path}: there is no such file.") from error
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            yield where, parse_as(TaskLine, parse_json(line, where), where)
        except ConfigError as error:
            raise ConfigError(
                f"--results: {error} Each line has to be one that tools/evaluate.py wrote to its "
                "--output; remove others, such as one that a kill cut off."
            ) from error


def _run_of(runs: Sequence[Run], line: TaskLine, where: str) -> int:
    """The place of the run that saved the checkpoint."""
    if line.iteration is None:
        raise ConfigError(
            f"--results: {where} is of {line.load}, a Hugging Face folder, which belongs to no "
            "iteration of a run. Evaluate checkpoints of the run (--load its --save folder)."
        )
    saves = [run.settings.get("save") for run in runs]
    mine = [n for n, save in enumerate(saves) if _same_folder(save, line.load)]
    if len(mine) != 1:
        known = ", ".join(f"{run.path}: {save}" for run, save in zip(runs, saves, strict=True))
        several = "more than one of the runs" if mine else "none of the runs"
        raise ConfigError(
            f"--results: {where} is of checkpoints in {line.load}, which is the --save folder of "
            f"{several} that are compared ({known}). Compare just the run that saved there; "
            "relative folders are taken from the working directory."
        )
    run = runs[mine[0]]
    if line.iteration > run.iterations:
        raise ConfigError(
            f"--results: {where} is of iteration {line.iteration}, but {run.path} ends at "
            f"{run.iterations}. Give the metrics of the whole run."
        )
    return mine[0]


def _same_folder(save: object, load: str) -> bool:
    return isinstance(save, str) and os.path.realpath(save) == os.path.realpath(load)


def _flops_at(run: Run, iteration: int) -> float | None:
    """Executed FLOPs at an iteration, linear between lines; None where they are not known."""
    before: tuple[int, float] = (0, 0.0)
    for record in run.records:
        if record.get("flops") is None:
            continue
        here = (record["iteration"], float(record["flops"]))
        if here[0] >= iteration:
            steps = here[0] - before[0]
            share = (iteration - before[0]) / steps if steps else 1.0
            return before[1] + share * (here[1] - before[1])
        before = here
    return None
