"""The causal language modelling loss."""

from __future__ import annotations

import torch

from megatron_eslm.objectives.base import Objective
from megatron_eslm.objectives.loss_tokens import LossTokens
from megatron_eslm.ops.head.cross_entropy import kept_linear_cross_entropy


class CausalLM(Objective):
    """-log p(label) of the kept tokens."""

    def token_losses(self, tokens: LossTokens) -> torch.Tensor:
        return kept_linear_cross_entropy(
            tokens.normed_SD,
            tokens.weight_VD,
            tokens.labels_S,
            tokens.scored_S,
            tokens.statistics,
            tokens.shard,
        )
