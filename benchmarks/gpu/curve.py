"""Row 5: bf16 trains, with the PyTorch head as with the Triton one, and as float32 does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import mean

from benchmarks.gpu.process import in_process
from benchmarks.gpu.row import Row, at_least, at_most
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.training import TINY, Flags, data_flags, train_all

LAST = 20
"""Steps that the final loss is the mean of."""


def rows(setup: Setup) -> Iterator[Row]:
    """Of the curves."""
    data = data_flags(setup)
    shape: Flags
    if setup.toy:
        shape = (*TINY, "--global-batch-size", 8, "--train-iters", 30)
        fall, apart = 0.1, 0.2
    else:
        shape = ("--model-size", "124M", "--micro-batch-size", 12, "--global-batch-size", 24)
        shape = (*shape, "--train-iters", 200, "--num-workers", 2, "--max-epochs", 100)
        fall, apart = 1.0, 0.02
    common = (*data, *shape, "--selection", "clm", "--eval-iters", 0, "--log-interval", 1)
    runs = {"bf16 torch": (*common, "--bf16", "--head-kernel", "torch", "--no-compile")}
    if setup.cuda:  # compiled, as is the default there
        runs["bf16 triton"] = (*common, "--bf16", "--head-kernel", "triton")
    runs["float32"] = (*common, "--tf32", "--no-compile")
    folder = setup.folder / "curves"
    folder.mkdir()
    final: dict[str, float] = {}
    for name, outcome in in_process(train_all, runs, folder, seconds=240.0):
        losses = outcome.column("loss")
        final[name] = mean(losses[-LAST:]) if all(map(math.isfinite, losses)) else math.nan
        utilizations = [mfu for mfu in outcome.column("mfu")[LAST:] if mfu is not None]
        note = f"{losses[0]:.3f} to {final[name]:.3f}"
        note += f", MFU {mean(utilizations):.1%}" if utilizations else ""
        fell = losses[0] - final[name]
        steps = len(losses)
        yield Row.measured(5, f"loss falls in {steps} steps, {name}", fell, at_least(fall), note)
    values = final.values()
    distance = max(values) - min(values) if all(map(math.isfinite, values)) else math.nan
    yield Row.measured(5, "final losses apart, nats", distance, at_most(apart))
