"""`--train-flops`: a budget by the paper's count ends a run, and its schedule fits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.training.command_line import read_command_line
from megatron_eslm.training.dry_run import dry_run
from tests.harness import run_ranks

from .runs import refusal, train, words

CHANGES = ("--eslm-alpha", "0.4", "--eslm-alpha-end", "0.1")
"""No two steps cost the same."""


def test_a_budget_ends_a_run(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> dict[str, Any]:
        init_distributed()
        found: dict[str, Any] = {}
        plain = ("--selection", "clm")
        found["long"] = long = train(words(data, *plain, iters=6), tmp_path / "long.jsonl")
        paper = long.column("flops_paper")
        assert long.column("flops_paper_micro_batch") == pytest.approx(paper)  # one a step
        # Steps that are known ahead: the run is one of --train-iters 4 to the bit.
        budget = ("--train-flops", 0.5 * (paper[2] + paper[3]))
        found["known"] = train(words(data, *plain, *budget, iters=6), tmp_path / "known.jsonl")
        found["four"] = train(words(data, *plain, iters=4), tmp_path / "four.jsonl")

        # Two steps, then larger ones: what is left of the budget is one of those.
        wide = ("--save", tmp_path / "wide", "--load", tmp_path / "wide", "--allow-data-change")
        argv = words(data, *plain, *budget, *wide, iters=6)
        train([*argv, "--exit-interval", "2"], tmp_path / "wide.jsonl")
        argv = [*argv, "--global-batch-size", "16"]
        found["wide"] = train(argv, tmp_path / "wide.jsonl").column("flops_paper")
        load = ("--load", tmp_path / "wide", "--allow-data-change")
        found["short"] = refusal(words(data, *plain, *budget, *load, iters=2))

        changing = train(words(data, *CHANGES, iters=6), tmp_path / "changing.jsonl")
        paper = changing.column("flops_paper")
        stop = (*CHANGES, "--train-flops", paper[3])
        save = ("--save", tmp_path / "save", "--load", tmp_path / "save")
        argv = words(data, *stop, *save, iters=6)
        found["text"], _ = dry_run(read_command_line(argv, 1))
        train([*argv, "--exit-interval", "3"], tmp_path / "stop.jsonl")
        found["stopped"] = train(argv, tmp_path / "stop.jsonl")
        found["changing"] = changing
        found["again"] = train(argv, tmp_path / "stop.jsonl").iteration
        other = words(data, *stop, "--load", tmp_path / "save", iters=6)
        found["refused"] = refusal(other)
        return found

    found = run_ranks(1, fn)[0]
    assert found["known"].column("loss") == found["four"].column("loss")
    assert found["known"].column("lr") == found["four"].column("lr") != found["long"].column("lr")
    assert found["wide"][-1] == pytest.approx(found["four"].column("flops_paper")[3])
    assert "Raise --train-iters or --train-flops" in found["short"]
    assert found["stopped"].iteration == found["again"] == 4
    assert found["stopped"].column("loss") == found["changing"].column("loss")[:4]
    assert "ends early           after step 4, by --train-flops" in found["text"]
    assert "Raise --train-flops" in found["refused"]


def test_the_limit_that_ends_before_the_budget_is_said(
    data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = read_command_line(words(data, "--selection", "clm", "--train-flops", "1e15"), 1)
    assert run.training.train_iters == 4
    assert "--train-iters 4 ends before --train-flops 1e+15" in caplog.text
    with pytest.raises(ConfigError, match="--train-flops needs --data-path"):
        read_command_line(["--train-flops", "1e15"], 1)
