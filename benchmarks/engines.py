"""Engines for measurements, as training builds them but without data: random ids do."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.flags import GPT2_VOCAB
from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.cost.flops import Work
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import plan_stages
from megatron_eslm.data.batch import Batch
from megatron_eslm.data.loader import read_batch
from megatron_eslm.data.mixture import Mixture
from megatron_eslm.engine.engine import Engine
from megatron_eslm.launch.device import prepare_device
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from megatron_eslm.training.build import build_engine, build_model
from megatron_eslm.training.step_batches import StepBatches
from megatron_eslm.training.step_selection import rows_of_rank
from megatron_eslm.watchdog.phases import Phases


class BenchRun:
    """One run without data; its engine is built when it is first asked for."""

    def __init__(self, *flags: str, vocab_size: int = GPT2_VOCAB) -> None:
        """
        Args:
            flags: of pretrain_gpt.py, without --data-path.
            vocab_size: of the tokenizer that there would be.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.run: RunConfig = parse_run(["--data-path", "none", *flags], world)
        self.mesh = mesh = build_mesh(
            self.run.engine.tensor_model_parallel_size,
            self.run.engine.pipeline_model_parallel_size,
        )
        self.vocab_size = vocab_size
        self.shape = self.run.shape(vocab_size)
        self.state = SelectionState(alpha=self.run.selection.initial_alpha)
        peers = Peers(mesh.dp_rank, mesh.dp_size, mesh.dp_group, Phases())
        self.policy = build_policy(self.run.selection, self.state, peers, self.run.training.seed)
        self.flops = build_flops(self.run, self.shape, self.state)
        self.work: Work = step_work(self.run)
        self.recorder = Recorder()
        self.device = prepare_device()

    @cached_property
    def engine(self) -> Engine:
        """As training builds it."""
        plan = plan_stages(self.run, self.shape, self.flops, self.work)
        blocks = plan.blocks(self.mesh.pp_rank)
        model = build_model(self.run, self.shape, self.mesh, self.policy, self.recorder, blocks)
        return build_engine(self.run, model, self.mesh, self.policy.peers.phases)

    @property
    def flops_of_step(self) -> float:
        """Matrix products of a step, by the executed ledger."""
        return self.flops.executed(self.work)

    def batches(self, seed: int = 0) -> list[Batch]:
        """Micro-batches of one step of this rank; the same for every engine of these sizes."""
        rows, length = self.run.training.micro_batch_size, self.run.model.seq_length
        assert rows and length
        rng = torch.Generator().manual_seed(1000 * seed + self.mesh.dp_rank)
        made = []
        for _ in range(self.run.gradient_accumulation_steps):
            tokens = torch.randint(self.vocab_size, (rows, length + 1), generator=rng)
            valid = torch.ones(rows, length, dtype=torch.bool)
            counts = valid.sum(1)  # on the host, as from the loader
            made.append(Batch.of(tokens.to(self.device), valid.to(self.device), num_valid_M=counts))
        return made

    def stepper(self) -> Callable[[], Any]:
        """A function that takes one step on always the same sequences, as the loop does."""
        return stepper(self.engine, self.run, self.vocab_size)


def stepper(engine: Engine, run: RunConfig, vocab_size: int) -> Callable[[], Any]:
    """A function that takes one step of an engine on random ids, always the same."""
    rows, sequences = run.training.micro_batch_size, run.training.global_batch_size
    assert rows and sequences and run.model.seq_length
    state, recorder = engine.model.policy.state, engine.model.recorder
    scored = run.reference.reference_losses is not None
    text = _RandomText(sequences, run.model.seq_length, vocab_size, scored=scored)
    own = list(rows_of_rank(range(sequences), rows, engine.mesh))
    pin = engine.device.type == "cuda"
    loader = itertools.cycle([read_batch(text, numbers, pin_memory=pin) for numbers in own])
    batches = StepBatches(engine, text, loader, rows)

    def step() -> None:
        step = batches.step(list(range(sequences)), state.alpha)
        engine.set_shape(step.shape)
        engine.step(step.batches, 1e-5)
        recorder.take()
        state.iteration += 1

    return step


class _RandomText(Mixture):
    """Sequences of random ids, in memory; with losses of a reference model if `scored`."""

    def __init__(
        self, sequences: int, seq_length: int, vocab_size: int, *, scored: bool = False
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(vocab_size, (sequences, seq_length + 1), generator=rng)
        self._losses = torch.rand(sequences, seq_length, generator=rng) if scored else None
        self.source: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=vocab_size))

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = self._tokens[i]
        sample = {"tokens": tokens, "valid": torch.ones(len(tokens) - 1, dtype=torch.bool)}
        return sample if self._losses is None else {**sample, "reference": self._losses[i]}
