"""Row 8: how often the host waits for the device in a micro-step, and in a whole step.

tests/cuda counts the same on a CPU with tensors that pretend; here CUDA itself reports.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.engines import BenchRun
from benchmarks.gpu.row import Row, at_most
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.speed import step_flags
from megatron_eslm.data.batch import Batch
from megatron_eslm.engine.engine import Engine
from megatron_eslm.launch.bootstrap import init_distributed

ESLM = ("--eslm-alpha", "0.1", "--eslm-scope")
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "clm": (("--selection", "clm"), 0),
    "eslm, scope step": ((*ESLM, "step"), 0),
    "eslm, scope global": ((*ESLM, "global"), 0),
    "random, scope global": (("--selection", "random", *ESLM, "global"), 0),
}
"""Flags, and waits of a micro-step at most, in one process."""
MICRO_STEPS = 4


def rows(setup: Setup) -> Iterator[Row]:
    """Of the waits."""
    if not setup.cuda:
        yield Row.not_run(8, "waits of the host", "needs CUDA")
        return
    init_distributed()
    for name, (flags, most) in CASES.items():
        bench = BenchRun(*step_flags("124M", 12, 10), *flags)
        engine, step = bench.engine, bench.stepper()
        step()
        found = Counter[str]()
        for batch in bench.batches()[:MICRO_STEPS]:
            found += waits_of(partial(_micro_step, engine, batch))
            engine.ds.step()
        bench.recorder.take()
        note = ", ".join(f"{count} x {place}" for place, count in found.most_common(3))
        what = f"waits of the host in a micro-step, {name}"
        yield Row.measured(8, what, found.total() / MICRO_STEPS, at_most(most), note)
        whole = waits_of(step)
        note = ", ".join(f"{count} x {place}" for place, count in whole.most_common(3))
        yield Row.measured(8, f"the same in a step of 10, {name}", whole.total(), None, note)
        what = f"synchronisations of the device in a step, {name}"
        # The profiler ends with one of its own.
        yield Row.measured(8, what, _device_synchronisations(step) - 1, at_most(0))


def _micro_step(engine: Engine, batch: Batch) -> None:
    engine.ds.backward(engine.ds(*batch))


def waits_of(work: Callable[[], object]) -> Counter[str]:
    """Places at which some work makes the host wait, as torch reports them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return count_waits(caught)


def count_waits(caught: list[warnings.WarningMessage]) -> Counter[str]:
    """Those warnings that report a wait, by file and line."""
    return Counter(
        f"{warning.filename.rpartition('/')[2]}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    )


def _device_synchronisations(step: Callable[[], object]) -> int:
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    calls = {event.key: event.count for event in profile.key_averages()}
    return calls.get("cudaDeviceSynchronize", 1)
