"""Rows 6, 7 and 9: how much of the peak a step reaches, what selection costs, and memory.

Each measurement has a process of its own, so that memory is that of one engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from statistics import median

import torch

from benchmarks.engines import BenchRun, stepper
from benchmarks.flags import GPT2_VOCAB, SHAPES
from benchmarks.gpu.process import in_process
from benchmarks.gpu.row import Bound, Row, at_least, at_most
from benchmarks.gpu.setup import Setup
from benchmarks.interleave import interleaved
from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.memory import estimate_memory
from megatron_eslm.cost.of_run import step_work
from megatron_eslm.cost.stages import plan_stages
from megatron_eslm.engine.compile import compile_blocks
from megatron_eslm.launch.bootstrap import init_distributed

MICRO_STEPS = 8
LEAST_MFU = {"124M": 0.45, "1.5B": 0.50}
"""With --compile and the largest micro-batch of the table, on an H100."""
MEMORY_ERROR = 0.15
PRICES: dict[str, tuple[tuple[str, ...], Bound]] = {
    "eslm": (("--eslm-alpha", "0.1"), at_most(0.95)),
    "eslm, proxy stride 8": (
        ("--eslm-alpha", "0.1", "--eslm-proxy-stride", "8"),
        at_most(0.90),
    ),
    "random": (("--selection", "random", "--eslm-alpha", "0.1"), at_most(0.95)),
    "rho1, stored losses": (
        ("--selection", "rho1", "--eslm-alpha", "0.1", "--reference-losses", "none"),
        at_most(1.05),
    ),
}
TOY_VOCAB = 1000


def step_flags(shape: str, rows: int, micro_steps: int, *, seq_length: int = 1024) -> list[str]:
    """Flags of pretrain_gpt.py for eager steps in bf16 of one process."""
    return [
        *(*SHAPES[shape], "--no-compile"),
        *("--bf16", "--seq-length", str(seq_length), "--train-iters", "1000"),
        *("--micro-batch-size", str(rows), "--global-batch-size", str(rows * micro_steps)),
    ]


def rows(setup: Setup) -> Iterator[Row]:
    """Of speed and memory."""
    clm, eslm = ("--selection", "clm"), ("--eslm-alpha", "0.1", "--eslm-scope", "global")
    cases = [
        ("124M", (12,), clm),
        ("124M", (32,), clm),
        ("1.5B", (8, 4), clm),
        ("llama-1B-4", (8,), clm),
        ("124M", (12,), eslm),
        ("1.5B", (4,), eslm),
    ]
    if setup.toy:
        cases = [("tiny", (4, 2), clm)]
    for shape, sizes, flags in cases:
        yield from in_process(_steps, setup, shape, sizes, flags, seconds=180.0)
    for shape, size in (("tiny", 10),) if setup.toy else (("124M", 12), ("350M", 8)):
        yield from in_process(_prices, setup, shape, size, seconds=120.0)


def _steps(
    setup: Setup, shape: str, sizes: tuple[int, ...], flags: tuple[str, ...]
) -> Iterator[Row]:
    """One engine, steps of each number of rows, eager and then compiled."""
    init_distributed()
    bench = _bench(setup, shape, sizes[0], flags)
    method = "clm" if flags[-1] == "clm" else "eslm"
    engine = bench.engine
    if setup.cuda:
        torch.cuda.reset_peak_memory_stats()
    yield from _utilizations(setup, bench, shape, sizes, "eager", method)
    yield _memory(setup, bench, f"{shape}, {sizes[0]} rows, {method}")
    if setup.toy or method != "clm":
        return
    compile_blocks(engine.model)
    yield from _utilizations(setup, bench, shape, sizes, "compiled", method)


def _bench(setup: Setup, shape: str, rows: int, flags: tuple[str, ...]) -> BenchRun:
    length, vocab = (32, TOY_VOCAB) if setup.toy else (1024, GPT2_VOCAB)
    return BenchRun(
        *step_flags(shape, rows, MICRO_STEPS, seq_length=length), *flags, vocab_size=vocab
    )


def _utilizations(
    setup: Setup, bench: BenchRun, shape: str, sizes: tuple[int, ...], form: str, method: str
) -> Iterator[Row]:
    for size in sizes:
        run = _with_rows(bench.run, size)
        step = stepper(bench.engine, run, bench.vocab_size)
        timings = interleaved({"step": step}, 2, warm_ups=1)
        work = step_work(run)
        flops = bench.flops.model_flops(work) / timings.median("step")
        tokens = work.tokens / timings.median("step")
        what = f"MFU, {method}, {shape}, {size} x {run.model.seq_length}, {form}"
        note = f"{flops / 1e12:.4g} TFLOP/s, {tokens:,.0f} tokens/s"
        peak = setup.peak_flops or (1e12 if setup.toy else None)
        if peak is None:
            yield Row.not_run(6, what, f"{note}; peak unknown: give --peak-tflops")
            continue
        bound = None
        if setup.toy:
            bound = at_least(1e-9)
        elif form == "compiled" and size == max(sizes) and (shape, size) != ("124M", 12):
            bound = at_least(LEAST_MFU[shape]) if shape in LEAST_MFU else None
        yield Row.measured(6, what, flops / peak, bound, note)


def _with_rows(run: RunConfig, rows: int) -> RunConfig:
    """The same run with another micro-batch; the engine of the first can take its steps."""
    steps = run.gradient_accumulation_steps
    training = dataclasses.replace(
        run.training, micro_batch_size=rows, global_batch_size=rows * steps
    )
    return dataclasses.replace(run, training=training)


def _memory(setup: Setup, bench: BenchRun, what: str) -> Row:
    plan = plan_stages(bench.run, bench.shape, bench.flops, bench.work)
    estimate = estimate_memory(bench.run, bench.shape, plan, bench.flops).total
    what = f"memory measured / --dry-run, {what}"
    if not setup.cuda:
        return Row.not_run(9, what, f"needs CUDA; {estimate / 2**20:.1f} MiB estimated")
    measured = torch.cuda.max_memory_allocated()
    ratio = measured / estimate
    note = f"{measured / 2**30:.2f} GiB of {estimate / 2**30:.2f} estimated"
    bound = at_most(1 + MEMORY_ERROR) if ratio > 1 else at_least(1 - MEMORY_ERROR)
    return Row.measured(9, what, ratio, bound, note)


def _prices(setup: Setup, shape: str, size: int) -> Iterator[Row]:
    init_distributed()
    runs = {"clm": _bench(setup, shape, size, ("--selection", "clm"))}
    for name, (flags, _) in PRICES.items():
        runs[name] = _bench(setup, shape, size, flags)
    repetitions = 2 if setup.toy else 5
    timings = interleaved({name: run.stepper() for name, run in runs.items()}, repetitions)
    for name, (_, bound) in PRICES.items():
        count = runs[name].flops_of_step / runs["clm"].flops_of_step
        spread = timings.ratios(name, "clm")
        note = f"[{min(spread):.3f}, {max(spread):.3f}], count {count:.3f}"
        what = f"step of {name} / clm, {shape}, {size} rows"
        ratio = timings.ratio(name, "clm")
        yield Row.measured(7, what, ratio, at_most(1e6) if setup.toy else bound, note)
    control = median(timings.ratios("random", "eslm"))
    bound = at_most(1e6 if setup.toy else 1.0)
    yield Row.measured(7, f"step of random / eslm, {shape}", control, bound)
