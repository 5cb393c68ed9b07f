"""Row 4: a run on the GPU and one on the CPU compute and keep the same, with every method.

In float32 without TF32. Scores that are within rounding of their threshold may fall on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.gpu.process import in_process
from benchmarks.gpu.row import Row, at_most, exactly
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.training import TINY, Flags, Outcome, data_flags, train_all

NEAR = 1e-4
"""Distance of a score from its threshold within which either side is right."""
START: Flags = ("--selection", "clm")
ESLM: Flags = ("--eslm-alpha", 0.3)


def methods(start: str) -> dict[str, Flags]:
    """Flags by name; `start` is a folder of checkpoints for those that need a model."""
    return {
        "eslm step": (*ESLM, "--eslm-scope", "step"),
        "eslm global": (*ESLM, "--eslm-scope", "global"),
        "eslm entropy": (*ESLM, "--eslm-score", "entropy", "--eslm-scope", "global"),
        "random": (*ESLM, "--selection", "random", "--eslm-scope", "global"),
        "rho1": (*ESLM, "--selection", "rho1", "--reference", start),
        "greats": (*ESLM, "--selection", "greats", "--split", "90,10"),
        "uncertainty": ("--selection", "uncertainty", "--load", start, "--finetune"),
        "distill": (
            *(*ESLM, "--distill", "eslm", "--distill-teacher", start),
            *("--distill-teacher-dtype", "float32"),
        ),
    }


@dataclass
class Difference:
    """Between two runs of a method."""

    loss: float = 0.0
    """Largest difference before the first choice that differs, in nats."""
    flipped: int = 0
    choices: int = 0
    far: int = 0
    """Choices that differ though the score is not near its threshold."""


def rows(setup: Setup) -> Iterator[Row]:
    """Of the CPU against the device."""
    data = data_flags(setup)
    if setup.toy:
        shape, iters = TINY, 3
    else:
        shape, iters = (
            (
                *("--num-layers", 4, "--hidden-size", 128, "--num-attention-heads", 4),
                *("--seq-length", 128, "--micro-batch-size", 8, "--lr", 1e-3, "--num-workers", 0),
            ),
            10,
        )
    sizes = ("--global-batch-size", 32, "--train-iters", iters, "--eval-iters", 0)
    common: Flags = (*data, *shape, *sizes, "--dump-selection", "{dumps}", "--log-interval", 1)
    common = (*common, "--no-compile")
    start = setup.folder / "start"
    runs: dict[str, Flags] = {"clm": START, **methods(str(start))}
    if setup.toy:
        kept = ("clm", "eslm step", "eslm global", "rho1")
        runs = {name: flags for name, flags in runs.items() if name in kept}
    runs = {name: (*common, *flags) for name, flags in runs.items()}
    theirs = {**runs, "clm": (*runs["clm"], "--save", start)}
    outcomes: list[dict[str, Outcome]] = []
    for where, on_cpu in ((theirs, True), (runs, False)):
        folder = setup.folder / f"same-{'cpu' if on_cpu else 'device'}"
        folder.mkdir()
        found = in_process(train_all, where, folder, seconds=180.0, on_cpu=on_cpu)
        outcomes.append(dict(found))
    differences = {name: difference(outcomes[0][name], outcomes[1][name]) for name in runs}
    yield from _rows(differences)


def _rows(differences: dict[str, Difference]) -> Iterator[Row]:
    name, worst = max(differences.items(), key=lambda item: item[1].loss)
    what = f"CPU and device, {len(differences)} methods: "
    note = f"worst: {name}"
    yield Row.measured(4, f"{what}losses, nats", worst.loss, at_most(1e-5), note)
    shares = {n: d.flipped / max(1, d.choices) for n, d in differences.items()}
    name, share = max(shares.items(), key=lambda item: item[1])
    note = f"worst: {name}" if share else ""
    yield Row.measured(4, f"{what}share of choices that differ", share, at_most(1e-3), note)
    far = {name: d.far for name, d in differences.items() if d.far}
    note = f"{far}" if far else ""
    total = float(sum(far.values()))
    yield Row.measured(4, f"{what}those not near a threshold", total, exactly(0), note)


def difference(one: Outcome, other: Outcome) -> Difference:
    """Between two runs of the same flags."""
    found = Difference()
    for step, (a, b) in enumerate(zip(one.steps, other.steps, strict=True), start=1):
        mine, theirs = one.dumps[step], other.dumps[step]
        _count(found, mine, theirs)
        if not found.flipped:
            found.loss = max(found.loss, abs(a["loss"] - b["loss"]))
    return found


def _count(found: Difference, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    rows_C = a["instance_kept"] != b["instance_kept"]
    near_C = np.abs(a["instance_scores"] - a["tau_instance"]) < NEAR
    both_C = a["instance_kept"] & b["instance_kept"]
    tokens_CT = (a["token_kept"] != b["token_kept"]) & both_C[:, None]
    near_CT = np.abs(a["token_scores"] - a["tau_token"][:, None]) < NEAR
    found.flipped += int(rows_C.sum()) + int(tokens_CT.sum())
    found.far += int((rows_C & ~near_C).sum()) + int((tokens_CT & ~near_CT).sum())
    found.choices += rows_C.size + tokens_CT.size
