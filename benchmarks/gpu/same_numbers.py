"""Rows 4, 13, 14: a run on the GPU and one on the CPU compute and keep the same.

Row 4 has every method, row 13 Llama's block, row 14 attention and positions inside documents.

In float32 without TF32. Scores that are within rounding of their threshold may fall on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.gpu.process import in_process
from benchmarks.gpu.row import Row, at_least, at_most, exactly
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


def variants(heads: int) -> dict[int, dict[str, Flags]]:
    """Flags by name, of the rows that vary the model; with so many attention heads."""
    llama: Flags = ("--architecture", "llama", "--num-query-groups", heads // 2)
    inside: Flags = ("--reset-attention-mask", "--reset-position-ids")
    eslm: Flags = (*ESLM, "--eslm-scope", "global")
    return {
        13: {
            "llama clm": (*llama, "--selection", "clm"),
            "llama eslm": (*llama, *ESLM, "--eslm-scope", "step"),
        },
        14: {"documents": (*eslm, *inside), "documents, llama": (*eslm, *inside, *llama)},
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
    heads, iters = (2, 3) if setup.toy else (4, 10)
    shape: Flags = TINY
    if not setup.toy:
        shape = ("--num-layers", 4, "--hidden-size", 128, "--num-attention-heads", heads)
        shape = (*shape, "--seq-length", 128, "--micro-batch-size", 8)
        shape = (*shape, "--lr", 1e-3, "--num-workers", 0)
    sizes = ("--global-batch-size", 32, "--train-iters", iters, "--eval-iters", 0)
    common: Flags = (*data, *shape, *sizes, "--dump-selection", "{dumps}", "--log-interval", 1)
    common = (*common, "--no-compile")
    start = setup.folder / "start"
    of_rows = {4: {"clm": START, **methods(str(start))}, **variants(heads)}
    if setup.toy:
        kept = ("clm", "eslm global", "rho1", "llama eslm", "documents")
        of_rows = {n: {k: v for k, v in found.items() if k in kept} for n, found in of_rows.items()}
    runs = {name: (*common, *flags) for found in of_rows.values() for name, flags in found.items()}
    theirs = {**runs, "clm": (*runs["clm"], "--save", start)}
    outcomes: list[dict[str, Outcome]] = []
    for where, on_cpu in ((theirs, True), (runs, False)):
        folder = setup.folder / f"same-{'cpu' if on_cpu else 'device'}"
        folder.mkdir()
        found = in_process(train_all, where, folder, seconds=180.0, on_cpu=on_cpu)
        outcomes.append(dict(found))
    cpu, device = outcomes
    for number, names in of_rows.items():
        yield from _rows(number, {name: difference(cpu[name], device[name]) for name in names})
    plain, inside = (device[name].column("loss")[0] for name in ("eslm global", "documents"))
    what = "first loss with documents' masks and without, nats apart"
    yield Row.measured(14, what, abs(plain - inside), at_least(1e-6))


def _rows(number: int, differences: dict[str, Difference]) -> Iterator[Row]:
    name, worst = max(differences.items(), key=lambda item: item[1].loss)
    which = f"{len(differences)} methods" if number == 4 else " and ".join(differences)
    what = f"CPU and device, {which}: "
    note = f"worst: {name}"
    yield Row.measured(number, f"{what}losses, nats", worst.loss, at_most(1e-5), note)
    shares = {n: d.flipped / max(1, d.choices) for n, d in differences.items()}
    name, share = max(shares.items(), key=lambda item: item[1])
    note = f"worst: {name}" if share else ""
    yield Row.measured(number, f"{what}share of choices that differ", share, at_most(1e-3), note)
    far = {name: d.far for name, d in differences.items() if d.far}
    note = f"{far}" if far else ""
    total = float(sum(far.values()))
    yield Row.measured(number, f"{what}those not near a threshold", total, exactly(0), note)


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
