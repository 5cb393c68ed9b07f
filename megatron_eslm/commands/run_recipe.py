"""Run a comparison from one YAML file: every method with every seed, then table and curves.

    megatron-eslm run-recipe examples/reproduce/main.yaml --set corpus=data/corpus

Interrupted, the same command goes on where it stopped. Started several times, the processes share
the runs; on several machines, --index I --of N gives each its part. See examples/reproduce/.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_eslm.command_line import command
from megatron_eslm.commands import compare_runs, pretrain
from megatron_eslm.config.flags import parse_options
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import ONE_OR_MORE, Flag, check_fields
from megatron_eslm.planning.hardware import ACCELERATORS, DEFAULT_NETWORK, machine_of

if TYPE_CHECKING:
    from megatron_eslm.recipes.recipe import Recipe, RecipeRun
    from megatron_eslm.recipes.runner import Runner


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What of the recipe to do."""

    recipe: Annotated[str, Flag(positional=True, metavar="RECIPE.yaml")]
    """The comparison."""

    set: Annotated[tuple[str, ...], Flag(repeated=True, metavar="NAME=VALUE")] = ()
    """Value of a ${NAME} in it."""

    only: Annotated[tuple[str, ...], Flag(metavar="METHOD")] = ()
    """No runs but of these methods."""

    index: Annotated[int, Flag(metavar="I")] | None = None
    """Do every N-th run, from the I-th on."""

    of: Annotated[int, Flag(metavar="N")] | None = None
    """Into how many parts the runs are divided."""

    dry_run: bool = False
    """Print what would be run."""

    gpu: Annotated[str, Flag(metavar="|".join(ACCELERATORS))] | None = None
    """With --dry-run: predict the hours of each training on this accelerator, without data."""

    gpus: Annotated[int, ONE_OR_MORE] | None = None
    """How many of them; default: 8."""

    report: bool = False
    """Only compare the runs that are done by now."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.gpu is not None and not self.dry_run:
            raise ConfigError(
                f"--gpu {self.gpu} predicts what a recipe costs; give it with --dry-run."
            )
        if self.gpus is not None and self.gpu is None:
            raise ConfigError(f"--gpus {self.gpus} needs --gpu, the accelerator.")
        if (self.index is None) != (self.of is None):
            raise ConfigError(
                "--index and --of belong together: --index 0 --of 4 is the first quarter."
            )
        if self.index is not None and self.of is not None and not 0 <= self.index < self.of:
            raise ConfigError(
                f"--index {self.index} --of {self.of}: the index runs from 0 to --of - 1."
            )


@command
def main(argv: Sequence[str]) -> int:
    """Return 0 if all runs of this process are done, 1 if not, 2 if the input cannot be used."""
    options = parse_options(RecipeOptions, argv, __doc__)
    from megatron_eslm.recipes.recipe import read_recipe
    from megatron_eslm.recipes.runner import Runner

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    recipe = read_recipe(options.recipe, dict(_variable(word) for word in options.set))
    runs = _chosen(recipe, options)
    runner = Runner(recipe, Path(pretrain.__file__))
    if options.dry_run:
        print("\n".join(_described(recipe, runs, runner)))
        if options.gpu is not None:
            print("\n".join(_costs(recipe, runs, options.gpu, options.gpus or 8)))
        return 0
    outcomes = {} if options.report else runner.train(runs)
    left = {name: outcome for name, outcome in outcomes.items() if outcome != "finished"}
    for name, outcome in left.items():
        print(f"{name}: {outcome}", file=sys.stderr)
    return _compare(recipe, runner, report=options.report) or (1 if left else 0)


def _described(recipe: Recipe, runs: list[RecipeRun], runner: Runner) -> Iterator[str]:
    """The command of each step and run."""
    for step in recipe.prepare:
        yield f"{step.creates}: {shlex.join(step.words)}"
    for run in runs:
        done = "  (done)" if runner.finished(run) else ""
        yield f"{run.folder.name}{done}: {shlex.join(run.words())}"


def _costs(recipe: Recipe, runs: list[RecipeRun], gpu: str, gpus: int) -> Iterator[str]:
    """A line for each run, and their sum."""
    from megatron_eslm.recipes.cost import ASSUMED, RecipeCost

    model = RecipeCost(recipe, machine_of(gpu, DEFAULT_NETWORK), gpus)
    costs = [model.of(run) for run in runs]
    machine = f"on {gpus} x {gpu}"
    width = max(len(machine), *(len(run.folder.name) for run in runs))
    yield f"{machine:<{width}s}  {'steps':>7s}  {'FLOPs':>9s}  {'hours':>7s}"
    for run, cost in zip(runs, costs, strict=True):
        hours = "unknown" if cost.seconds is None else f"{cost.seconds / 3600:7.2f}"
        yield f"{run.folder.name:<{width}s}  {cost.steps:7,}  {cost.flops:9.3e}  {hours}"
    flops = sum(cost.flops for cost in costs)
    known = sum(cost.seconds or 0 for cost in costs) / 3600
    yield f"{'sum':<{width}s}  {'':7s}  {flops:9.3e}  {known:7.2f}, {known * gpus:,.0f} GPU hours"
    yield ASSUMED


def _compare(recipe: Recipe, runner: Runner, *, report: bool) -> int:
    """Table and curves once all runs are done, or of those that are; the exit code."""
    done = [run for run in recipe.runs if runner.finished(run)]
    print(f"{len(done)} of {len(recipe.runs)} runs are done", file=sys.stderr)
    if not done or (len(done) < len(recipe.runs) and not report):
        return 0
    words = [str(run.metrics) for run in done]
    words += ["--labels", *(run.method for run in done)]
    code = compare_runs.main([*words, "--output-prefix", str(recipe.output / "report")])
    if code == 0 and len(done) == len(recipe.runs):
        runner.after()
    return code


def _chosen(recipe: Recipe, options: RecipeOptions) -> list[RecipeRun]:
    """The runs that this process is asked to do."""
    known = {run.method for run in recipe.runs}
    for method in options.only:
        if method not in known:
            raise ConfigError(f"--only {method}: the recipe has {', '.join(sorted(known))}.")
    runs = [run for run in recipe.runs if not options.only or run.method in options.only]
    return runs[options.index :: options.of]


def _variable(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (equals and name):
        raise ConfigError(f"--set {word} is not NAME=VALUE.")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
