#!/usr/bin/env python
"""Run a comparison from one YAML file: every method with every seed, then table and curves.

    python tools/run_recipe.py examples/reproduce/small.yaml --set corpus=data/corpus

Interrupted, the same command goes on where it stopped. Started several times, the processes share
the runs; on several machines, --index I --of N gives each its part. See examples/reproduce/.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eslm.command_line import Parser, command
from megatron_eslm.errors import ConfigError
from megatron_eslm.recipes.recipe import Recipe, RecipeRun, read_recipe
from megatron_eslm.recipes.runner import Runner, StoppedError

ROOT = Path(__file__).resolve().parent.parent


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all runs of this process are done, 1 if not, 2 if the input cannot be used."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _run(args)
    except StoppedError as stop:
        print(f"stopped by {stop}; the same command goes on from here", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.recipe, dict(_variable(word) for word in args.set))
    runs = _chosen(recipe, args)
    runner = Runner(recipe, ROOT)
    if args.dry_run:
        for step in recipe.prepare:
            print(f"{step.creates}: {shlex.join(step.words)}")
        for run in runs:
            done = "  (done)" if runner.finished(run) else ""
            print(f"{run.folder.name}{done}: {shlex.join(run.words())}")
        return 0
    outcomes = {} if args.report else runner.train(runs)
    left = {name: outcome for name, outcome in outcomes.items() if outcome != "finished"}
    for name, outcome in left.items():
        print(f"{name}: {outcome}", file=sys.stderr)
    done = [run for run in recipe.runs if runner.finished(run)]
    print(f"{len(done)} of {len(recipe.runs)} runs are done", file=sys.stderr)
    if done and (args.report or len(done) == len(recipe.runs)):
        command = [sys.executable, str(ROOT / "tools" / "compare_runs.py")]
        command += [str(run.metrics) for run in done]
        command += ["--labels", *(run.method for run in done)]
        command += ["--output-prefix", str(recipe.output / "report")]
        if code := subprocess.run(command).returncode:
            return code
        if len(done) == len(recipe.runs):
            runner.after()
    return 1 if left else 0


def _chosen(recipe: Recipe, args: argparse.Namespace) -> list[RecipeRun]:
    """The runs that this process is asked to do."""
    if (args.index is None) != (args.of is None):
        raise ConfigError(
            "--index and --of belong together: --index 0 --of 4 is the first quarter."
        )
    known = {run.method for run in recipe.runs}
    for method in args.only or []:
        if method not in known:
            raise ConfigError(f"--only {method}: the recipe has {', '.join(sorted(known))}.")
    runs = [run for run in recipe.runs if args.only is None or run.method in args.only]
    if args.index is None:
        return runs
    if not 0 <= args.index < args.of:
        raise ConfigError(
            f"--index {args.index} --of {args.of}: the index runs from 0 to --of - 1."
        )
    return runs[args.index :: args.of]


def _variable(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (equals and name):
        raise ConfigError(f"--set {word} is not NAME=VALUE.")
    return name, value


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="value of a ${NAME} in it"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="no runs but of these methods")
    parser.add_argument(
        "--index", type=int, metavar="I", help="do every N-th run, from the I-th on"
    )
    parser.add_argument("--of", type=int, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument(
        "--report", action="store_true", help="only compare the runs that are done by now"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
