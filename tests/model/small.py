"""A small GPT, batches for it, and one step of it, for the tests of this folder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_eslm.model.gpt import GPT, ModelSettings, build_gpt
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.parallel.mesh import Mesh, build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, Recorder, SelectionRecord, SelectionState

from .reference import Config

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=24,
    num_attention_heads=2,
    ffn_hidden_size=40,
    max_position_embeddings=12,
    vocab_size=45,
    padded_vocab_size=48,
)
CONFIG = Config(num_layers=3, num_heads=2, vocab_size=45)
POSITIONS = 11
INIT_STD = 0.3  # far from the uniform prediction, so that scores are well apart


def small_gpt(
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    keep_logits: bool = True,
    shape: ModelShape = SHAPE,
    iteration: int = 0,
    alpha: float = 0.1,
    **options,
) -> tuple[GPT, Recorder]:
    """A model in training mode with every bias and norm at random, as after some training."""
    mesh = mesh or build_mesh()
    selection = SelectionOptions(eslm_alpha=alpha, **options)
    state = SelectionState(alpha=alpha, iteration=iteration)
    group = mesh.dp_group if mesh.dp_size > 1 else None
    policy = build_policy(selection, state, Peers(mesh.dp_rank, mesh.dp_size, group), seed=seed)
    recorder = Recorder()
    model = build_gpt(
        shape,
        mesh,
        policy,
        recorder,
        CausalLM(),
        ModelSettings(keep_logits=keep_logits),
        seed=seed,
        init_std=INIT_STD,
    )
    perturb(model, mesh)
    return model, recorder


@torch.no_grad()
def perturb(model: GPT, mesh: Mesh) -> None:
    """Move biases and norms, which start at 0 and 1, by a known amount, shard by shard."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            sharded = getattr(parameter, "tensor_model_parallel", False)
            size, rank = (mesh.tp_size, mesh.tp_rank) if sharded else (1, 0)
            full = torch.arange(parameter.numel() * size) + len(name)
            parameter += 0.2 * torch.sin(1.7 * full).chunk(size)[rank]


@dataclass(frozen=True)
class Batch:
    tokens_MU: torch.Tensor
    valid_MT: torch.Tensor

    def part(self, rank: int, size: int) -> Batch:
        """The rows of data-parallel rank `rank` of `size`, in sampler order."""
        return Batch(self.tokens_MU.chunk(size)[rank], self.valid_MT.chunk(size)[rank])


def make_batch(rows: int, *, seed: int = 0, padding: bool = False, ties: bool = False) -> Batch:
    """Random tokens.

    Args:
        rows: M.
        seed: of the tokens.
        padding: rows end early and some labels in them are masked; one row has no label at all.
        ties: the rows are copies of two, and a row repeats one token.
    """
    rng = torch.Generator().manual_seed(100 + seed)
    tokens_MU = torch.randint(SHAPE.vocab_size, (rows, POSITIONS + 1), generator=rng)
    valid_MT = torch.ones(rows, POSITIONS, dtype=torch.bool)
    if ties:
        tokens_MU = tokens_MU[torch.arange(rows) % 2]
    if padding:
        for row in range(rows):
            valid_MT[row, POSITIONS - 2 * (row % 4) :] = False
        valid_MT[:, 3] = torch.arange(rows) % 3 != 0
        valid_MT[rows // 2] = False
    return Batch(tokens_MU, valid_MT)


@dataclass
class Step:
    """One forward and backward pass, in plain and picklable form."""

    loss: float
    gradients: dict[str, torch.Tensor]
    record: SelectionRecord

    @property
    def kept_rows(self) -> list[int]:
        kept_M = self.record.instance_kept_M
        if kept_M is None:
            return list(range(self.record.num_rows))
        return kept_M.nonzero().squeeze(1).tolist()

    @property
    def kept_tokens(self) -> list[tuple[int, int]]:
        return [tuple(x) for x in self.record.token_kept_MT.nonzero().tolist()]


def run_step(model: GPT, recorder: Recorder, batch: Batch) -> Step:
    model.train()
    model.zero_grad()
    loss = model(batch.tokens_MU, batch.valid_MT)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    (record,) = recorder.take()
    return Step(loss.item(), gradients, record)


def relative_difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference over the norm of `other`."""
    norm = other.double().norm().item()
    difference = (mine.double() - other.double()).norm().item()
    return difference / norm if norm else (math.inf if difference else 0.0)
