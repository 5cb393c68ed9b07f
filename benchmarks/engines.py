"""Engines for measurements, as training builds them but without data: random ids do."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from benchmarks.flags import GPT2_VOCAB
from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.parallel.bootstrap import prepare_device
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.parallel.phases import Phases
from megatron_eslm.selection.batch import Batch
from megatron_eslm.selection.policy import build_policy
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from megatron_eslm.training.build import build_engine, build_flops, build_model
from megatron_eslm.training.engine import Engine
from megatron_eslm.training.estimate import step_work
from megatron_eslm.training.flops import Work
from megatron_eslm.training.stages import plan_stages


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
        self.flops = build_flops(self.run, self.shape, self.policy)
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
            made.append(Batch.of(tokens.to(self.device), valid.to(self.device)))
        return made

    def stepper(self, seed: int = 0) -> Callable[[], Any]:
        """A function that takes one step on always the same batches."""
        batches, engine = self.batches(seed), self.engine

        def step() -> None:
            engine.step(iter(batches), 1e-5)
            self.recorder.take()
            self.state.iteration += 1

        return step
