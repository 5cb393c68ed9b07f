"""The tasks of the paper: names, shots and the metric that its tables show (appendix D.2)."""

from __future__ import annotations

from typing import NamedTuple


class SuiteTask(NamedTuple):
    """A task as a table of the paper has it."""

    name: str
    """Name of lm-eval."""
    shots: int
    metric: str
    """Key of lm-eval's results, without the filter."""


PAPER = (
    SuiteTask("arc_easy", 0, "acc_norm"),
    SuiteTask("lambada_openai", 5, "acc"),
    SuiteTask("sciq", 5, "acc_norm"),
    SuiteTask("hellaswag", 5, "acc_norm"),
    SuiteTask("triviaqa", 1, "exact_match"),
    SuiteTask("copa", 5, "acc"),
    SuiteTask("multirc", 5, "acc"),
    SuiteTask("openbookqa", 5, "acc_norm"),
    SuiteTask("piqa", 5, "acc_norm"),
)
"""Two are read from its numbers, not its text: LAMBADA may be `lambada_standard`, and OpenBookQA is
near `acc` in the tables at 124M and near `acc_norm` in the others."""

SUITES = {"paper": PAPER}


def shown_metric(task: str, metrics: dict[str, float], suite: tuple[SuiteTask, ...] = ()) -> str:
    """Name of the metric to show of a task: the suite's, else acc_norm, acc, or the first."""
    wanted = [each.metric for each in suite if each.name == task]
    return next(name for name in (*wanted, "acc_norm", "acc", *metrics) if name in metrics)
