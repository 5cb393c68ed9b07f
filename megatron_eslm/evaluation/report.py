"""Results of tasks as lines of JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_eslm.evaluation.run import TaskResult
from megatron_eslm.evaluation.suite import SuiteTask, shown_metric


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """What one checkpoint reaches in one task."""

    load: str
    iteration: int | None
    dtype: str
    limit: int | None
    result: TaskResult

    def line(self) -> dict[str, Any]:
        """As it is written to --output; a value that is not finite is None."""
        own = {key: value for key, value in vars(self).items() if key != "result"}
        line = {**own, **asdict(self.result)}
        for name in ("metrics", "stderr"):
            line[name] = {k: v if math.isfinite(v) else None for k, v in line[name].items()}
        return line


def table(results: Sequence[ModelResult], suite: tuple[SuiteTask, ...] = ()) -> str:
    """The best of each task over the checkpoints, and the unweighted mean of tasks.

    Args:
        results: of one or more checkpoints of one model.
        suite: decides which metric of a task is shown.
    """
    rows = [("task", "shots", "metric", "value", "stderr", "bits/byte", "documents", "iteration")]
    values = []
    for task in dict.fromkeys(each.result.task for each in results):
        of_task = [each for each in results if each.result.task == task]
        metric = shown_metric(task, of_task[0].result.metrics, suite)
        lower = metric in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
        best = (min if lower else max)(of_task, key=lambda each: each.result.metrics[metric])
        found = best.result
        if not lower and not found.members:
            values.append(found.metrics[metric])
        rows.append(
            (
                f"{task} ({len(found.members)} tasks)" if found.members else task,
                str(found.shots),
                metric,
                f"{found.metrics[metric]:.4f}",
                _number(found.stderr.get(metric)),
                _number(found.metrics.get("bits_per_byte")),
                f"{found.documents} of {found.split}",
                "" if best.iteration is None else str(best.iteration),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if len(values) > 1:
        of = f" of the suite's {len(suite)}" if suite else ""
        lines.append(f"mean of {len(values)}{of} tasks: {sum(values) / len(values):.4f}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
