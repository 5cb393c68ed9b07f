"""The parity matrix: every layout trains the same model.

    python -m tests.training.parity [--quick]

trains one small model for five steps of four micro-steps with each method in every layout of
tensor, pipeline and data parallelism and ZeRO, over gloo in float32, and compares it with the
single process: kept sequences and tokens must be identical, losses and gradient norms agree to
1e-5. It prints the table of docs/parity.md; the tests run a part of it.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.training.runs import Outcome, read_dumps, train, words

METHODS: dict[str, tuple[str, ...]] = {
    "clm": ("--selection", "clm"),
    # Of 4 micro-steps 3 and 2 are trained on.
    "eslm-loss": ("--eslm-alpha", "0.3", "--eslm-scope", "step"),
    "eslm-entropy": ("--eslm-alpha", "0.5", "--eslm-score", "entropy", "--eslm-scope", "step"),
    "eslm-llama": (
        *("--eslm-alpha", "0.3", "--eslm-scope", "step", "--architecture", "llama"),
        *("--num-attention-heads", "4", "--num-query-groups", "2"),
        "--untie-embeddings-and-output-weights",
    ),
    "random": ("--eslm-alpha", "0.5", "--selection", "random", "--eslm-scope", "step"),
}
MICRO = 4
"""Sequences of a global micro-step, however many ranks share them."""
STEPS = ("--num-layers", "5", "--global-batch-size", str(4 * MICRO))
ITERS = 5
TOLERANCE = 1e-5
CASES = 4
"""Cases per launch: the process groups of past runs stay, some ten threads each, and a thousand
threads make every later run slow."""


@dataclass(frozen=True, order=True)
class Case:
    """A layout, with what else may not change the result."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 0
    extra: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            *("--tensor-model-parallel-size", str(self.tp)),
            *("--pipeline-model-parallel-size", str(self.pp)),
            *("--zero-stage", str(self.zero), *self.extra),
        )

    def __str__(self) -> str:
        return " ".join((f"TP{self.tp} PP{self.pp} DP{self.dp} ZeRO-{self.zero}", *self.extra))


def all_cases() -> list[Case]:
    """The whole matrix, and the options that change how a layout computes."""
    sizes = itertools.product((1, 2), (1, 2, 4), (1, 2))
    cases = [Case(*size, zero) for size in sizes for zero in (0, 1)]
    cases += [Case(tp, 1, dp, zero) for tp in (1, 2) for dp in (1, 2) for zero in (2, 3)]
    cases += [
        Case(2, 1, 1, 0, ("--sequence-parallel",)),
        Case(2, 2, 1, 1, ("--sequence-parallel",)),
        Case(2, 1, 2, 3, ("--sequence-parallel",)),
        Case(1, 1, 2, 3, ("--activation-checkpoint-interval", "1")),
        Case(2, 2, 1, 0, ("--activation-checkpoint-interval", "2")),
        Case(1, 4, 1, 0, ("--pipeline-split", "2,1,1,1")),
        Case(2, 1, 1, 0, ("--head-logits", "recompute")),
    ]
    return sorted(cases, key=lambda case: (case.world, case))


def covering_cases() -> list[Case]:
    """Each size, ZeRO stage and option at least once, every pair of sizes, on few ranks."""
    keep = {
        Case(1, 1, 2, 1),
        Case(1, 2, 1, 0),
        Case(2, 1, 1, 1),
        Case(1, 4, 1, 1),
        Case(1, 2, 2, 0),
        Case(2, 2, 1, 1),
        Case(2, 1, 2, 0),
        Case(2, 1, 2, 2),
        Case(2, 1, 2, 3),
        Case(1, 1, 2, 2),
        Case(2, 2, 2, 1),
    }
    return [case for case in all_cases() if case in keep or case.extra]


def covering_runs() -> dict[Case, list[str]]:
    """ESLM by loss in each covering case, and in turn one of the other methods."""
    others = ("clm", "random", "eslm-entropy")
    return {case: ["eslm-loss", others[n % len(others)]] for n, case in enumerate(covering_cases())}


@dataclass(frozen=True)
class Difference:
    """How a run in a layout differs from the single process."""

    same_selection: bool
    loss: float
    """Largest difference of a loss, training or validation."""
    score: float
    """Largest difference of a sequence's or token's score."""
    grad_norm: float
    """Largest relative difference."""

    @property
    def is_none(self) -> bool:
        """To rounding."""
        return self.same_selection and max(self.loss, self.grad_norm) <= TOLERANCE

    def __str__(self) -> str:
        return f"{'same' if self.same_selection else 'OTHER'}, {self.loss:.0e}"


def run_cases(
    data: list[str], folder: Path, runs: Mapping[Case, Iterable[str]]
) -> dict[Case, dict[str, Outcome]]:
    """Train the methods of each case; {case: {method: Outcome}}. Dumps go to `folder`."""
    from tests.harness import run_ranks  # hides GPUs, which other users of this file need

    outcomes: dict[Case, dict[str, Outcome]] = {}
    # ZeRO 3 last, which leaves DeepSpeed in another state.
    ordered = sorted(runs, key=lambda case: (case.world, case.zero == 3, case))
    for world, group in itertools.groupby(ordered, key=lambda case: case.world):
        cases = list(group)
        for batch in (cases[n : n + CASES] for n in range(0, len(cases), CASES)):

            def on_rank(rank: int, batch: list[Case] = batch) -> list[dict[str, Outcome]]:
                return [train_methods(data, folder, case, runs[case]) for case in batch]

            results = run_ranks(world, on_rank, timeout=300.0 * len(batch))[0]
            outcomes.update(zip(batch, results, strict=True))
    return outcomes


def train_methods(
    data: list[str], folder: Path, case: Case, methods: Iterable[str] = METHODS
) -> dict[str, Outcome]:
    """Train every method in a case, on the ranks that there are; dumps go to `folder`."""
    outcomes = {}
    for method in methods:
        flags = METHODS[method]
        name = f"{case} {method}".replace(" ", "_")
        argv = words(
            data,
            *(*STEPS, *flags, *case.flags, "--dump-selection", folder / name, "--no-compile"),
            iters=ITERS,
            micro_batch_size=MICRO // case.dp,
        )
        outcomes[method] = train(argv, folder / f"{name}.jsonl")
    return outcomes


def compare(folder: Path, case: Case, method: str, ours: Outcome, one: Outcome) -> Difference:
    """A run of `case` beside that of the single process."""
    mine, theirs = (read_dumps(folder / f"{c} {method}".replace(" ", "_")) for c in (case, Case()))
    assert mine.keys() == theirs.keys() and len(mine) == ITERS
    same, score = True, 0.0
    for name, dump in mine.items():
        for key in ("tokens", "instance_kept", "token_kept"):
            same &= bool(np.array_equal(dump[key], theirs[name][key]))
        for key in ("instance_scores", "token_scores", "tau_instance", "tau_token"):
            a, b = dump[key], theirs[name][key]
            same &= bool(np.array_equal(np.isnan(a), np.isnan(b)))
            score = max(score, float(np.nan_to_num(np.abs(a - b)).max()))
    losses = [
        np.abs(np.subtract(ours.column("loss"), one.column("loss"))).max(),
        np.abs(np.subtract(ours.valid_losses(), one.valid_losses())).max(),
    ]
    norms = np.abs(np.divide(ours.column("grad_norm"), one.column("grad_norm")) - 1.0).max()
    # Not the FLOPs: the vocabulary is padded to a multiple that grows with TP.
    counts = ("tokens", "tokens_trained", "kept_instances", "kept_tokens")
    same &= all(ours.column(name) == one.column(name) for name in counts)
    return Difference(same, float(max(losses)), score, float(norms))


def matrix(
    data: list[str], folder: Path, runs: Mapping[Case, Iterable[str]]
) -> dict[Case, dict[str, Difference]]:
    """Every case beside the single process, with the methods that are named for it."""
    named = {method for methods in runs.values() for method in methods}
    alone = [method for method in METHODS if method in named]
    outcomes = run_cases(data, folder, {Case(): alone, **runs})
    one = outcomes[Case()]
    return {
        case: {
            method: compare(folder, case, method, outcomes[case][method], one[method])
            for method in methods
        }
        for case, methods in runs.items()
    }


def table(differences: dict[Case, dict[str, Difference]]) -> str:
    """Markdown: what was kept, and the largest difference of a loss in nats."""
    methods = [m for m in METHODS if any(m in row for row in differences.values())]
    lines = [
        f"| layout | {' | '.join(methods)} | gradient norm |",
        f"|---|{'---|' * len(methods)}---:|",
    ]
    for case, row in differences.items():
        norm = max(difference.grad_norm for difference in row.values())
        cells = " | ".join(str(row.get(method, "")) for method in methods)
        lines.append(f"| {case} | {cells} | {norm:.0e} |")
    return "\n".join(lines)


def main() -> None:
    """Print the matrix; exit code 1 if a layout differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="what `make test` runs of it")
    quick = parser.parse_args().quick
    from tests.training.conftest import DOMAINS, make_domain

    folder, begin = Path(tempfile.mkdtemp(prefix="parity-")), time.monotonic()
    try:
        data = [make_domain(folder / name, name, 400) for name in DOMAINS]
        runs = covering_runs() if quick else {case: list(METHODS) for case in all_cases()}
        differences = matrix(data, folder, runs)
    finally:
        shutil.rmtree(folder)
    print(table(differences))
    rows = [difference for row in differences.values() for difference in row.values()]
    wrong = sum(not difference.is_none for difference in rows)
    print(f"\n{len(rows)} runs, {wrong} differ, {time.monotonic() - begin:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
