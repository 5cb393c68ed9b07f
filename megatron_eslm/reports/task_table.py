"""Table of tasks from the metrics of `--eval-tasks`: the best of each task over a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megatron_eslm.evaluation.suite import shown_metric
from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import Run
from megatron_eslm.reports.tables import Table

_PREFIX = "tasks/"
_HIGHER_IS_BETTER = ("acc", "acc_norm", "exact_match", "f1")


def task_tables(groups: Sequence[Group]) -> list[Table]:
    """The table, if any run has been evaluated on a task with an accuracy."""
    metrics = _shown([run for group in groups for run in group.runs])
    if not metrics:
        return []
    rows = []
    for group in groups:
        best = [[_best(run, key) for key in metrics] for run in group.runs]
        cells = [_cell([of_run[n] for of_run in best]) for n in range(len(metrics))]
        rows.append([group.title, *cells, _cell([_mean(of_run) for of_run in best])])
    header = ["", *(key.removeprefix(_PREFIX).replace("/", " ") for key in metrics), "mean"]
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


def _shown(runs: Sequence[Run]) -> list[str]:
    """Keys of the metrics to show, one a task."""
    found: dict[str, dict[str, float]] = {}
    for record in (record for run in runs for record in run.records):
        for key, value in record.items():
            task, slash, metric = key.removeprefix(_PREFIX).rpartition("/")
            if key.startswith(_PREFIX) and slash and metric in _HIGHER_IS_BETTER:
                found.setdefault(task, {})[metric] = value
    return [f"{_PREFIX}{task}/{shown_metric(task, metrics)}" for task, metrics in found.items()]


def _best(run: Run, key: str) -> float | None:
    values = (record.get(key) for record in run.records)
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
