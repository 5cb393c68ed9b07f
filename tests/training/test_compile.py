"""--compile: the same training, whatever numbers of rows ranks keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eslm.config.run import parse_run
from megatron_eslm.engine import compile as module
from megatron_eslm.engine.compile import resolve_compile
from megatron_eslm.errors import ConfigError
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
