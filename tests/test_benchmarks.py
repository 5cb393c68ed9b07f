"""The measurements run and print what they should; what they measure is not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.interleave import Timings, interleaved

ROOT = Path(__file__).parent.parent
TINY = ("--shape", "tiny", "--rows", "10", "--seq-length", "32", "--repetitions", "2")
MODULES = {
    "selection_step": (1, TINY, 5),
    "peer_step": (1, TINY, 1),
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
