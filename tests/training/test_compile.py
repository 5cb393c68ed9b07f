"""--compile: the same training, whatever numbers of rows ranks keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo

from megatron_eslm.config.run import parse_run
from megatron_eslm.engine import compile as module
from megatron_eslm.engine.compile import resolve_compile
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.layers import Block
from megatron_eslm.training.loop import Callback, StepOutcome, Trainer
from tests.harness import run_ranks

from .runs import ROWS, Outcome, assert_same_dumps, train, words

STEPS = ("--global-batch-size", 2 * ROWS, "--train-iters", 4)
CASES = {
    "clm": (1, ("--selection", "clm")),
    "checkpoints": (1, ("--eslm-alpha", "0.3", "--activation-checkpoint-interval", "1")),
    "dp2": (2, ("--eslm-alpha", "0.3", "--zero-stage", "1", "--micro-batch-size", str(ROWS // 2))),
    # Ranks keep 0 to 2 rows of a micro-step.
    "dp2 rows stay": (
        2,
        (
            *("--eslm-alpha", "0.7", "--zero-stage", "1"),
            *("--micro-batch-size", str(ROWS // 2)),
        ),
    ),
    "llama": (
        1,
        (
            *("--eslm-alpha", "0.3", "--architecture", "llama"),
            *("--num-attention-heads", "4", "--num-query-groups", "2"),
        ),
    ),
    "tp2": (2, ("--eslm-alpha", "0.3", "--tensor-model-parallel-size", "2")),
    "pp2": (2, ("--eslm-alpha", "0.3", "--pipeline-model-parallel-size", "2")),
}


@pytest.mark.slow  # each compilation takes half a minute
@pytest.mark.parametrize("case", CASES)
def test_compiled_blocks_follow_the_same_course(data: list[str], tmp_path: Path, case: str) -> None:
    ranks, flags = CASES[case]

    def run(*more: str) -> Outcome:
        place = tmp_path / ("compiled" if more else "plain")
        argv = words(data, *STEPS, *flags, *more, "--dump-selection", place)
        return train(argv, place.with_suffix(".jsonl"))

    def fn(rank: int) -> tuple[Outcome, Outcome]:
        plain = run()
        import torch._dynamo

        torch._dynamo.reset()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            compiled = run("--compile")
        return plain, compiled

    plain, compiled = run_ranks(ranks, fn, timeout=500.0)[0]
    for column in ("loss", "grad_norm"):
        np.testing.assert_allclose(compiled.column(column), plain.column(column), rtol=1e-4)
    if case != "clm":
        assert_same_dumps(tmp_path / "compiled", tmp_path / "plain")


INSIDE = ("--reset-attention-mask", "--reset-position-ids")
LATER = {
    "scope step": (
        *("--eslm-alpha", "0.3", "--eslm-scope", "step", "--global-batch-size", 4 * ROWS),
        *INSIDE,
    ),
    "documents": ("--eslm-alpha", "0.3", "--eslm-scope", "global", *INSIDE),
    "greats": ("--selection", "greats", "--eslm-alpha", "0.3", "--split", "90,10"),
    "lora": ("--eslm-alpha", "0.3", "--lora-rank", "2"),
}
"""Flags of runs in one process whose shapes are the same in every step."""


class Graphs(Callback):
    """Notes after each step how many graphs have been compiled."""

    def __init__(self) -> None:
        self.after_step: list[int] = []

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        self.after_step.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("eager", ["scope step"]),  # the graphs and their guards, without a C++ compiler
        pytest.param("inductor", [*LATER], marks=pytest.mark.slow),  # more than a minute
    ],
    ids=["eager", "inductor"],
)
def test_no_step_compiles_anew_and_the_course_is_the_same(
    data: list[str], start: Path, tmp_path: Path, backend: str, names: list[str]
) -> None:
    def fn(rank: int) -> dict[str, tuple[Outcome, Outcome, list[int]]]:
        compile_module = Block.compile
        Block.compile = lambda self: compile_module(self, backend=backend)  # type: ignore
        found = {}
        for name in names:
            flags = LATER[name]
            more = ("--load", start / "weights") if name == "lora" else ()
            place, graphs = tmp_path / f"{name} compiled", Graphs()

            def watch(trainer: Trainer, graphs: Graphs = graphs) -> None:
                trainer.callbacks = [*trainer.callbacks, graphs]

            def argv(place: Path, flags: tuple = (*flags, *more)) -> list[str]:
                own = ("--dump-selection", place, "--eval-iters", 0)
                return words(data, *STEPS, *flags, *own, "--train-iters", 3)

            plain = train(argv(tmp_path / name), tmp_path / f"{name}.jsonl")
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                again = [*argv(place), "--compile"]
                compiled = train(again, tmp_path / f"{name} compiled.jsonl", prepare=watch)
            found[name] = plain, compiled, graphs.after_step
        return found

    (found,) = run_ranks(1, fn, timeout=800.0)
    for name, (plain, compiled, graphs) in found.items():
        assert graphs[0] > 0, name
        assert graphs[1:] == [graphs[0]] * (len(graphs) - 1), (name, graphs)
        for column in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                compiled.column(column), plain.column(column), rtol=1e-4, err_msg=name
            )
        assert_same_dumps(tmp_path / f"{name} compiled", tmp_path / name)


def test_without_a_compiler_it_is_refused_before_training(monkeypatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--compile needs a C\+\+ compiler"):
        resolve_compile(True, None)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "c_compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"--compile needs (Triton|a C compiler)"):
        resolve_compile(True, None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--compile needs Triton"):
        resolve_compile(True, None)


@pytest.mark.parametrize(
    ("cuda", "compiler", "flags", "compiles", "said"),
    [
        (False, "cc", (), False, None),
        (True, "cc", (), True, None),
        (True, "cc", ("--no-compile",), False, None),
        (True, "cc", ("--zero-stage", "3"), False, "--zero-stage 3"),
        (True, "cc", ("--hidden-dropout", "0.1"), False, "--hidden-dropout"),
        (True, None, (), False, "it needs a C compiler"),
        (True, None, ("--no-compile",), False, None),
    ],
)
def test_the_default_is_to_compile_on_cuda_where_it_can(
    monkeypatch, cuda: bool, compiler: str | None, flags: tuple[str, ...], compiles: bool, said: Any
) -> None:
    run = parse_run(["--data-path", "none", "--model-size", "124M", *flags], 1)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "c_compiler", lambda: compiler)
    resolved, obstacle = resolve_compile(run.model.compile, run.why_eager)
    assert resolved is compiles
    assert (obstacle is None) if said is None else (said in obstacle)
