"""The measurements run and print what they should; what they measure is not tested here."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.interleave import Timings, interleaved
from benchmarks.plain_gpt import PlainGPT
from tests.model.small import SHAPE, make_batch, relative_difference, run_step, small_gpt

ROOT = Path(__file__).parent.parent
TINY = ("--shape", "tiny", "--rows", "10", "--seq-length", "32", "--repetitions", "2")
MODULES = {
    "selection_step": (1, TINY, 5),
    "peer_step": (1, (*TINY, "--peer", "plain", "--dtype", "bf16"), 1),
    "peer_memory": (1, TINY, 1),
    "engine_overhead": (1, TINY, 1),
    "thresholds": (2, TINY, 1),
    "step_scope": (2, TINY, 2),
    "compile_step": (1, TINY, 1),
    "saving": (2, TINY, 4),
    "head_kernel": (1, ("--tokens", "64", "--hidden-size", "64", "--repetitions", "2"), 2),
}


@pytest.mark.slow  # half a minute each on a busy machine
@pytest.mark.parametrize("module", MODULES)
def test_prints_json_and_a_table_line(module: str) -> None:
    ranks, flags, rows = MODULES[module]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", f"benchmarks.{module}", *flags),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(records) == rows
    for record in records:
        assert record["value"] > 0 and record["target"] and record["machine"] and record["date"]
        assert sum(line.startswith(f"| {record['row']} |") for line in lines) == 1


def test_the_plain_peer_computes_what_we_do(process_group: None) -> None:
    # Padding of the vocabulary takes probability in the peer, so there is none.
    shape = dataclasses.replace(SHAPE, vocab_size=SHAPE.padded_vocab_size)
    model, recorder = small_gpt(shape=shape, selection="clm")
    batch, peer = make_batch(4), PlainGPT(shape)
    ours, theirs = run_step(model, recorder, batch), dict(peer.named_parameters())
    for name, weight in model.named_parameters():
        with torch.no_grad():
            theirs[_name_in_peer(name)].copy_(_in_peer(name, weight))
    loss = peer(batch.tokens_MU)
    loss.backward()
    assert loss.item() == pytest.approx(ours.loss, rel=1e-5)
    assert len(theirs) == len(ours.gradients)
    for name, gradient in ours.gradients.items():
        other = theirs[_name_in_peer(name)].grad
        assert relative_difference(_in_peer(name, gradient), other) < 1e-4, name


def _name_in_peer(name: str) -> str:
    return re.sub(r"embedding\.|attention\.|mlp\.|final_", "", name)


def _in_peer(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The fused projection's rows by (q|k|v, head), not by (head, q|k|v)."""
    if ".qkv." not in name:
        return weight
    split = weight.unflatten(0, (SHAPE.num_attention_heads, 3, -1))
    return split.transpose(0, 1).flatten(0, 2)


def test_ratios_are_of_neighbours_and_orders_change() -> None:
    timings = Timings({"a": [1.0, 2.0, 30.0], "b": [2.0, 4.0, 3.0]})
    assert timings.ratio("a", "b") == 0.5
    assert timings.ratios("a", "b") == [0.5, 0.5, 10.0]
    called: list[str] = []
    cases = {name: (lambda name=name: called.append(name)) for name in "abc"}
    found = interleaved(cases, 8, warm_ups=1)
    assert called[:3] == ["a", "b", "c"]
    rounds = [called[i : i + 3] for i in range(3, len(called), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == dict.fromkeys(
        "abc", 8
    )
