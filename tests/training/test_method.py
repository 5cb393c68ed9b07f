"""What a run says of its method, and that a checkpoint is continued by its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.checkpoint.manifest import Entry, Manifest
from megatron_eslm.checkpoint.same_method import check_same_method
from megatron_eslm.config.run import parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.arithmetic import num_params
from megatron_eslm.training.header import header
from megatron_eslm.training.method import method_text

from ..argv import later_wins
from .forging import SHAPE
from .runs import MODEL

BASE = ["--data-path", "x", *MODEL, "--train-iters", "10", "--micro-batch-size", "4"]
DENSE = "--distill dense --distill-teacher t --selection clm"
CONSENT = (
    "to change it, give --allow-method-change, or start a new run from its weights with --finetune."
)


def parse(flags: str):
    return parse_run(later_wins([*BASE, *flags.split()]), 1)


def continue_with(before: str, now: str) -> None:
    options = json.loads(json.dumps(parse(before).to_dict()))
    files = {name: Entry(bytes=0, crc32=0) for name in ("run.json", "state.json", "tensors.json")}
    found = CheckpointInfo(
        folder=Path("run/iter_0000010"),
        manifest=Manifest(run_id="0" * 32, iteration=10, kind="training", files=files),
        run={"options": options},
        shape=SHAPE,
    )
    check_same_method(parse(now), found)


@pytest.mark.parametrize(
    ("before", "now", "remedy"),
    [
        ("--selection clm", "", "give --selection clm"),
        ("", "--selection random", "give --selection eslm --eslm-score loss"),
        ("--eslm-score entropy", "", "give --eslm-score entropy"),
        ("--eslm-level token", "", "give --eslm-level token"),
        ("--selection random --eslm-level token", "--selection random", "give --eslm-level token"),
        (DENSE, "--selection clm", "give --distill dense"),
        ("--selection clm", DENSE, "leave out --distill"),
        (DENSE, f"{DENSE} --distill salt", "give --distill dense"),
        ("", DENSE, "give --selection eslm --eslm-score loss --eslm-level both and leave out "
                    "--distill"),
    ],
)  # fmt: skip
def test_another_method_needs_consent(before: str, now: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        continue_with(before, now)
    text = str(caught.value)
    assert text.startswith("run/iter_0000010 was trained with --selection ")
    assert ", but this run would continue with --selection " in text
    assert f"To keep the method, {remedy}; {CONSENT}" in text
    continue_with(before, f"{now} --allow-method-change")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("", "--eslm-alpha 0.3 --eslm-proxy-layers 2"),
        # What a policy does not look at is no part of it.
        ("--selection clm --eslm-score entropy", "--selection clm --eslm-level token"),
        ("--selection random --eslm-score entropy", "--selection random"),
        (DENSE, f"{DENSE} --distill-weight 0.3"),
    ],
)
def test_numbers_may_change(before: str, now: str) -> None:
    continue_with(before, now)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("", "eslm of sequences and tokens, alpha 0.1, by loss, early exit after block 1"),
        (
            "--eslm-alpha 0.2 --eslm-score entropy --eslm-level instance --eslm-proxy-layers 2",
            "eslm of sequences, alpha 0.2, by entropy, early exit after block 2",
        ),
        ("--eslm-adaptive --eslm-level token", "eslm of tokens, alpha 0.1, by loss, adaptive"),
        ("--selection clm", "clm (all sequences, all tokens)"),
        ("--selection random", "random of sequences and tokens, alpha 0.1"),
        ("--selection greats", "greats of sequences, alpha 0.1"),
        (DENSE, "clm (all sequences, all tokens), distillation dense"),
    ],
)
def test_a_method_in_words(flags: str, text: str) -> None:
    run = parse(flags)
    assert method_text(run.selection, run.objective.distill) == text


def test_the_header_says_what_runs_where() -> None:
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --zero-stage 1"
    run = parse_run([*BASE, *layout.split(), "--bf16", "--global-batch-size", "48"], 8)
    shape = run.shape(257)
    assert header(run, shape, ["prose", "code"]).splitlines() == [
        "eslm of sequences and tokens, alpha 0.1, by loss, early exit after block 1 | "
        f"{num_params(shape):,} parameters (3 blocks x 32) | bfloat16 on CPU",
        "2 tensor x 2 pipeline x 2 data-parallel ranks, ZeRO 1 | 10 steps of 48 sequences x 32 "
        "tokens = 6 micro-steps x 2 ranks x 4; trained on 40 = 5 x 2 x 4 (16.7% "
        "dropped) | data: prose, code",
    ]
