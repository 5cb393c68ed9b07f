"""Random control: keep the same shares, drawn at random."""

from __future__ import annotations

import torch

from megatron_eslm.data.batch import Rows
from megatron_eslm.parallel.seeding import derive_seed, uniform
from megatron_eslm.selection.policy import SelectionPolicy, register
from megatron_eslm.selection.scored import ScoredBatch


@register("random")
class RandomControl(SelectionPolicy):
    """Keep random sequences, and random tokens of these.

    The draw depends on seed, step and the row's number in the step or global micro-batch, so every
    layout drops the same sequences and tokens. Selection needs no logits, so within a micro-batch
    sequences are dropped right after the embedding.
    """

    sequence_source = token_source = "policy"
    reads = frozenset({"eslm_level"})

    def _uniform(self, level: str, rows: Rows, positions: int, like: torch.Tensor) -> torch.Tensor:
        """float32 [M, positions], numbered through all rows that are scored together."""
        state = self.state
        seed = derive_seed(self.seed, "random", level, state.iteration, state.micro_step)
        first, count = rows.first * positions, rows.num_rows * positions
        return uniform(seed, first, count, like.device).view(rows.num_rows, positions)

    def score_sequences(self, scored: ScoredBatch) -> torch.Tensor:
        return self._uniform("instance", scored.rows, 1, scored.valid_MP).squeeze(1)

    def score_tokens(self, scored: ScoredBatch) -> torch.Tensor:
        return self._uniform("token", scored.rows, scored.valid_MP.shape[1], scored.valid_MP)
