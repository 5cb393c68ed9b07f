"""Table of tasks: the best of each over the evaluations of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import TASKS, Run
from megatron_eslm.reports.tables import Table
from megatron_eslm.reports.task_scores import shown_scores


def task_tables(groups: Sequence[Group]) -> list[Table]:
    """The table, if any run has been evaluated on a task with an accuracy."""
    scores = shown_scores([run for group in groups for run in group.runs])
    if not scores:
        return []
    rows = []
    for group in groups:
        best = [[_best(run, key) for key in scores] for run in group.runs]
        cells = [_cell([of_run[n] for of_run in best]) for n in range(len(scores))]
        rows.append([group.title, *cells, _cell([_mean(of_run) for of_run in best])])
    header = ["", *(key.removeprefix(TASKS).replace("/", " ") for key in scores), "mean"]
    return [
        Table(
            "Tasks",
            header,
            rows,
            "The best of each task over the evaluations of a run, and their unweighted mean. Means "
            "over seeds, ± the standard error over seeds. The best of several is above what one "
            "checkpoint reaches, the more the fewer documents there are.",
        )
    ]


def _best(run: Run, key: str) -> float | None:
    values = (record.get(key) for record in run.task_records)
    return max((v for v in values if v is not None and math.isfinite(v)), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _cell(values: Sequence[float | None]) -> str:
    """Mean over seeds and its standard error; n/a unless every seed has a value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "n/a"
    text = f"{statistics.fmean(known):.4f}"
    if len(known) == 1:
        return text
    return f"{text} ± {statistics.stdev(known) / math.sqrt(len(known)):.4f}"
