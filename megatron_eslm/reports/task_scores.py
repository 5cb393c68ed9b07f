"""Which metric of each task is shown, and its mean over the tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_eslm.evaluation.suite import shown_metric
from megatron_eslm.reports.runs import TASKS, Record, Run

_HIGHER_IS_BETTER = ("acc", "acc_norm", "exact_match", "f1")


def shown_scores(runs: Sequence[Run]) -> list[str]:
    """Fields of the metrics to show, one a task, `tasks/NAME/METRIC`; only accuracies."""
    found: dict[str, dict[str, float]] = {}
    for record in (record for run in runs for record in run.task_records):
        for key, value in record.items():
            task, slash, metric = key.removeprefix(TASKS).rpartition("/")
            if key.startswith(TASKS) and slash and metric in _HIGHER_IS_BETTER:
                found.setdefault(task, {})[metric] = value
    return [f"{TASKS}{task}/{shown_metric(task, metrics)}" for task, metrics in found.items()]


def mean_scores(run: Run, scores: Sequence[str]) -> list[Record]:
    """`iteration`, `flops` and `score`, the unweighted mean; where all tasks have a number."""
    means = []
    for record in run.task_records:
        values = [record.get(score) for score in scores]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(known) == len(scores):
            mean = sum(known) / len(known)
            means.append({**record, "score": mean})
    return means
