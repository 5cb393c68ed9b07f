"""Run tasks with a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from megatron_eslm.evaluation.gold import gold_metrics
from megatron_eslm.evaluation.native_lm import NativeLM
from megatron_eslm.evaluation.tasks import FEWSHOT_SEED, ReadyTask


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model reaches in a task."""

    task: str
    version: str
    """Of lm-eval, and of its definition of the task."""
    shots: int
    split: str
    documents: int
    data: str
    metrics: dict[str, float]
    """lm-eval's, with `gold_logprob` and `bits_per_byte` where answers are scored."""
    stderr: dict[str, float]
    """Standard errors of those that have one."""
    seconds: float
    members: tuple[str, ...] = ()
    """Tasks that it is over, if it is a group."""


def run_tasks(
    lm: NativeLM, tasks: Sequence[ReadyTask], limit: int | None = None, resamples: int = 0
) -> Iterator[TaskResult]:
    """Run tasks one after the other. Collective over the ranks of `lm`, which get the same results.

    Args:
        lm: the model.
        tasks: the tasks.
        limit: documents of each task at most, the first ones.
        resamples: for standard errors of metrics without a closed form, such as perplexity; 0
            leaves all standard errors out.
    """
    from lm_eval.evaluator import evaluate

    for ready in tasks:
        began = time.perf_counter()
        ready.task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples for every checkpoint
        found: Any = evaluate(
            lm, {"tasks": {ready.name: ready.task}}, limit=limit, bootstrap_iters=resamples
        )
        samples = found["samples"][ready.name]
        values, errors = _metrics(found["results"][ready.name])
        yield TaskResult(
            task=ready.name,
            version=f"lm-eval {version('lm-eval')}, task {found['versions'].get(ready.name)}",
            shots=ready.shots,
            split=ready.split,
            documents=found["n-samples"][ready.name]["effective"],
            data=ready.data,
            metrics={**values, **gold_metrics(ready.task, samples)},
            stderr=errors,
            seconds=time.perf_counter() - began,
        )


def group_result(group: Any, results: Sequence[TaskResult]) -> TaskResult:
    """The metrics that a group of tasks has over these, as lm-eval weights them.

    Args:
        group: lm-eval's Group.
        results: of its tasks at least.
    """
    names = [task.task_name for task in group.get_all_tasks()]
    own = [each for each in results if each.task in names]
    given = {
        each.task: {
            **{f"{name},none": value for name, value in each.metrics.items()},
            **{f"{name}_stderr,none": value for name, value in each.stderr.items()},
            "sample_len": each.documents,
        }
        for each in own
    }
    values, errors = _metrics(group.aggregate(given))
    return TaskResult(
        task=group.name,
        version=f"lm-eval {version('lm-eval')}, group {group.version}",
        shots=max(each.shots for each in own),
        split=own[0].split,
        documents=sum(each.documents for each in own),
        data=own[0].data,
        metrics=values,
        stderr=errors,
        seconds=sum(each.seconds for each in own),
        members=tuple(names),
    )


def _metrics(found: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors by name of the metric, from keys such as `acc_stderr,none`."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found.items():
        name, comma, _ = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue  # alias, sample_len, or "N/A" for an error that cannot be had
        into, name = (
            (errors, name[: -len("_stderr")]) if name.endswith("_stderr") else (values, name)
        )
        into.setdefault(name, float(value))
    return values, errors
