"""Row 15: checkpoints written while training goes on are those that training waits for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.gpu.process import in_process
from benchmarks.gpu.row import Row, exactly
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.training import SMALL, TINY, Flags, data_flags, train_all
from megatron_eslm.checkpoint.manifest import list_checkpoints, verify

ITERS, INTERVAL = 6, 2
KINDS = ("async-save", "no-async-save")
OF_A_RUN = {"run_id", "elapsed_seconds"}
"""Fields of state.json that no two runs share."""


def rows(setup: Setup) -> Iterator[Row]:
    """Of saving."""
    folder = setup.folder / "saving"
    folder.mkdir()
    common: Flags = (
        *(*data_flags(setup), *(TINY if setup.toy else SMALL)),
        *("--global-batch-size", 16, "--train-iters", ITERS, "--eslm-alpha", 0.3, "--bf16"),
        *("--eval-iters", 0, "--log-interval", 1, "--no-compile", "--deterministic"),
        *("--save-interval", INTERVAL, "--keep-last", 0),
    )
    runs = {kind: (*common, f"--{kind}", "--save", folder / kind) for kind in KINDS}
    found = dict(in_process(train_all, runs, folder, seconds=120.0))
    losses = [found[kind].column("loss") for kind in KINDS]
    what = f"--async-save against --no-async-save, every {INTERVAL} steps: "
    apart = float(np.abs(np.subtract(*losses)).max())
    yield Row.measured(15, f"{what}losses, nats", apart, exactly(0))
    ours, theirs = ({path.name: path for path in list_checkpoints(folder / k)} for k in KINDS)
    same = [name for name in ours if name in theirs and same_contents(ours[name], theirs[name])]
    wanted = ITERS // INTERVAL
    note = f"of {len(ours)} and {len(theirs)}"
    yield Row.measured(15, f"{what}equal checkpoints", len(same), exactly(wanted), note)


def same_contents(one: Path, other: Path) -> bool:
    """Whether two complete checkpoints hold the same state and the same tensors, to the bit."""
    return _state(one) == _state(other) and _equal(_tensors(one), _tensors(other))


def _state(folder: Path) -> dict[str, Any]:
    verify(folder)
    state = json.loads((folder / "state.json").read_text())
    return {name: value for name, value in state.items() if name not in OF_A_RUN}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name} {name}": x for file in files for name, x in load_file(file).items()}


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    if not one or one.keys() != other.keys():
        return False
    return all(torch.equal(one[name], other[name]) for name in one)
