"""`--dry-run`: the numbers that it promises are those that a real run then reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_eslm.config.run import parse_run
from megatron_eslm.parallel.bootstrap import init_distributed
from megatron_eslm.training.build import dry_run
from tests.harness import run_ranks

from .runs import Outcome, train, words


def number(text: str, label: str) -> float:
    found = re.search(rf"^{label}\s+([\d,.e+]+)", text, re.MULTILINE)
    assert found, (label, text)
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "flags",
    [
        ("--eslm-alpha", "0.3"),
        ("--eslm-alpha", "0.3", "--eslm-level", "instance"),
        ("--eslm-alpha", "0.3", "--eslm-level", "token"),
        ("--eslm-alpha", "0.3", "--eslm-scope", "local"),
        ("--eslm-alpha", "0.3", "--eslm-proxy-stride", "4"),
        ("--selection", "clm"),
        ("--selection", "random", "--eslm-alpha", "0.2"),
        ("--head-logits", "recompute"),
    ],
    ids=" ".join,
)
def test_promised_and_done(
    data: list[str], tmp_path: Path, flags: tuple[str, ...], world: int
) -> None:
    def fn(rank: int) -> tuple[str, Outcome]:
        argv = words(
            data, *flags, "--global-batch-size", "16", iters=3, micro_batch_size=8 // world
        )
        init_distributed()
        text, refusal = dry_run(parse_run([*argv, "--dry-run"], world))
        assert refusal is None
        return text, train(argv, tmp_path / "m.jsonl")

    text, outcome = run_ranks(world, fn)[0]
    last = outcome.steps[-1]
    assert number(text, "steps") == 3
    assert number(text, "tokens read") == last["tokens"] == 3 * 16 * 32
    assert number(text, "tokens trained on") == last["tokens_trained"]
    assert number(text, "FLOPs executed") == pytest.approx(last["flops"], rel=1e-3)
    assert number(text, "FLOPs by the paper") == pytest.approx(last["flops_paper"], rel=1e-3)
    assert f"2 micro-steps x {world} ranks x {8 // world}" in text


def test_what_it_says_of_model_and_data(data: list[str]) -> None:
    def fn(rank: int) -> str:
        init_distributed()
        return dry_run(parse_run(words(data), 1))[0]

    text = run_ranks(1, fn)[0]
    # 384 x 32 + 32 x 32 + 3 x (12 x 32^2 + 13 x 32) + 64
    assert number(text, "parameters") == 51_488
    assert "vocabulary 257 padded to 384" in text
    assert re.search(
        r"domain prose +weight 0\.6000, 392 documents, [\d,]+ tokens, 0\.\d+ epochs", text
    )
    assert re.search(r"domain code +weight 0\.4000", text)
    assert "validation           16 sequences an evaluation" in text
    assert "GiB = weights" in text


def test_a_run_that_reads_too_much_is_described_and_refused(data: list[str]) -> None:
    def fn(rank: int) -> tuple[str, str]:
        init_distributed()
        text, refusal = dry_run(parse_run(words(data, iters=100_000), 1))
        return text, str(refusal)

    text, refusal = run_ranks(1, fn)[0]
    assert number(text, "steps") == 100_000 and re.search(r"domain prose .* [\d,.]+ epochs", text)
    assert "--max-epochs 1 allows" in refusal
