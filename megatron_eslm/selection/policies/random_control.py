"""The control beside every claim: the same shares, drawn at random."""

from __future__ import annotations

import torch

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.ops.keep_rule import EXCLUDED
from megatron_eslm.parallel.seeding import generator
from megatron_eslm.selection.policy import LeveledPolicy, register


@register("random")
class RandomControl(LeveledPolicy):
    """The same shares as eslm, drawn at random: the control beside every claim.

    The draw depends on seed, step and the row's number in the step or global micro-batch, so every
    layout drops the same sequences and tokens. Nothing is scored, so sequences that are dropped
    within a micro-batch are dropped right after the embedding.
    """

    source = "policy"

    def _uniform(self, level: str, rows: Rows, *positions: int) -> torch.Tensor:
        rng = generator(self.seed, "random", level, self.state.iteration, self.state.micro_step)
        return torch.rand((rows.total, *positions), generator=rng)[rows.numbers_M]

    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        scores_M = self._uniform("instance", rows).to(valid_MT.device)
        return torch.where(valid_MT.any(dim=1), scores_M, EXCLUDED)

    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        scores_MT = self._uniform("token", rows, batch.valid_MT.shape[1])
        return scores_MT.to(batch.valid_MT.device)
