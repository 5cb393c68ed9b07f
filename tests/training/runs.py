"""Whole training runs of a tiny model, and what they leave behind, for the tests of this folder.

`train` runs inside a rank that `harness.run_ranks` has started; several runs fit into one launch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.training.build import build_trainer
from megatron_eslm.training.command_line import read_command_line
from megatron_eslm.training.loop import Trainer

from ..argv import later_wins

ROWS = 8
"""Sequences of a global micro-step, however many ranks share them."""
SEQ_LENGTH = 32
VOCAB_SIZE = 257
"""Bytes and end-of-document."""

MODEL = (
    *("--num-layers", "3", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", str(SEQ_LENGTH), "--lr", "5e-3", "--eval-iters", "2", "--num-workers", "0"),
    *("--log-interval", "1", "--init-method-std", "0.1"),
)


def words(
    data: list[str], *flags: str | int | float | Path, iters: int = 4, micro_batch_size: int = ROWS
) -> list[str]:
    """A command line for a tiny run; later flags win."""
    path = ["0.6", data[0], "0.4", data[1]]
    start = ["--micro-batch-size", str(micro_batch_size), "--train-iters", str(iters)]
    return later_wins(["--data-path", *path, *MODEL, *start, *map(str, flags)])


@dataclass
class Outcome:
    """What one run did, on one rank."""

    stopped: int | None
    iteration: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the metrics file (rank 0)."""

    def column(self, name: str) -> list[Any]:
        """A field of every trained iteration."""
        return [line[name] for line in self.steps if line["iteration"] > 0]

    def valid_losses(self) -> list[float]:
        return [line["valid_loss"] for line in self.steps if line["valid_loss"] is not None]


def build(argv: list[str]) -> Trainer:
    """A Trainer in this rank."""
    init_distributed()
    return build_trainer(read_command_line(later_wins(argv), dist.get_world_size()))


def train(
    argv: list[str],
    metrics: Path | None = None,
    prepare: Callable[[Trainer], None] | None = None,
) -> Outcome:
    """Build and train in this rank; `prepare` may touch what was built."""
    if metrics is not None:
        argv = [*argv, "--metrics-file", str(metrics)]
    trainer = build(argv)
    if prepare is not None:
        prepare(trainer)
    stopped = trainer.train()
    outcome = Outcome(None if stopped is None else int(stopped), trainer.state.iteration)
    if metrics is not None and dist.get_rank() == 0:
        outcome.steps = read_metrics(metrics)
    return outcome


def refusal(argv: list[str]) -> str:
    """The message with which this rank refuses to build the run."""
    try:
        build(argv)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"was not refused: {' '.join(argv)}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file without those that describe a run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "run" not in line]


def read_dumps(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """All dumped steps by file name."""
    return {p.name: dict(np.load(p)) for p in sorted(folder.glob("*.npz"))}


def assert_unequal_ranks(folder: Path, ranks: int) -> None:
    """In at least one step, ranks kept unequal numbers of the sequences that they read."""
    dumps = read_dumps(folder).values()
    kept = [dump["instance_kept"].reshape(-1, ranks, ROWS // ranks) for dump in dumps]
    assert any(len(set(k.sum(axis=(0, 2)).tolist())) > 1 for k in kept), kept


def assert_same_dumps(ours: Path, theirs: Path, *, exact: bool = False) -> None:
    """The same steps kept the same rows and tokens; scores and losses agree to 1e-5."""
    a, b = read_dumps(ours), read_dumps(theirs)
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key, value in a[name].items():
            if exact or value.dtype.kind in "bi":
                np.testing.assert_array_equal(value, b[name][key], err_msg=f"{name} {key}")
            else:
                np.testing.assert_allclose(
                    value, b[name][key], rtol=1e-4, atol=1e-5, err_msg=f"{name} {key}"
                )


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of the parameters as the model computes with them (gathered under ZeRO 3)."""
    import deepspeed

    model = trainer.engine.model
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
