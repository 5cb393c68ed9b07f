"""Whole runs of training in one process, for rows that compare runs."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.setup import Setup

Flags = tuple[str | int | float | Path, ...]
TINY: Flags = (
    *("--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 2, "--seq-length", 32),
    *("--micro-batch-size", 8, "--lr", 1e-3, "--num-workers", 0),
)
SMALL: Flags = (
    *("--num-layers", 4, "--hidden-size", 768, "--num-attention-heads", 12),
    *("--seq-length", 256, "--micro-batch-size", 8, "--lr", 1e-3),
)
"""Of rows about checkpoints: large enough that a save takes longer than a step."""


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    steps: list[dict[str, Any]]
    """Lines of the metrics file from iteration 1 on."""
    dumps: dict[int, dict[str, np.ndarray]]
    """Dumps of the selection by iteration; empty without --dump-selection."""

    def column(self, name: str) -> list[Any]:
        """A field of every step."""
        return [line[name] for line in self.steps]


def train_all(runs: dict[str, Flags], folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Train one run after the other; yields (name, outcome).

    All share the process, so all have the same --tf32 and --deterministic.
    """
    from megatron_eslm.launch.bootstrap import init_distributed
    from megatron_eslm.launch.device import set_matmul_precision
    from megatron_eslm.training.build import build_trainer
    from megatron_eslm.training.command_line import read_command_line

    for name, flags in runs.items():
        metrics, dumps = folder / f"{name}.jsonl", folder / f"{name}-dumps"
        words = [str(word).format(dumps=dumps) for word in flags]
        run = read_command_line([*words, "--metrics-file", str(metrics)], 1)
        set_matmul_precision(tf32=run.engine.tf32, deterministic=run.engine.deterministic)
        init_distributed()
        trainer = build_trainer(run)
        trainer.train()
        del trainer
        gc.collect()
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        steps = [line for line in lines if line.get("iteration", 0) > 0]
        files = sorted(dumps.glob("iter*.npz"))
        yield name, Outcome(steps, {int(f.stem[4:]): dict(np.load(f)) for f in files})


def data_flags(setup: Setup) -> Flags:
    """--data-path of some text: the demo corpus, or for toys random words, made on first use."""
    folder = setup.folder / "data"
    if not setup.toy:
        from megatron_eslm.data.demo_corpus import prepare_demo_corpus

        return ("--data-path", *prepare_demo_corpus(str(folder)))
    from megatron_eslm.data.preprocess import preprocess
    from megatron_eslm.data.tokenizers.build import ByteTokenizer

    if not folder.exists():
        folder.mkdir()
        rng = random.Random(0)
        words = ["risk", "token", "is", "kept", "the", "easy", "one", "dropped", "(", ")", "="]
        texts = [" ".join(rng.choices(words, k=rng.randint(4, 60))) for _ in range(400)]
        preprocess(["words"], str(folder / "words"), ByteTokenizer(), documents=texts)
    return ("--data-path", folder / "words")
