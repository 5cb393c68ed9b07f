"""Uncertainty: keep the tokens that the model is least certain of, by their loss."""

from __future__ import annotations

import torch

from megatron_eslm.selection.policy import SelectionPolicy, register
from megatron_eslm.selection.scored import ScoredBatch


@register("uncertainty")
class Uncertainty(SelectionPolicy):
    """Keep the --uncertainty-quantile of tokens with the highest loss (arXiv 2503.16511).

    The objective of the same name handles the other tokens.
    """

    token_source = "head"
    holds_dropped_tokens = True
    reads = frozenset({"uncertainty_quantile"})

    def score_tokens(self, scored: ScoredBatch) -> torch.Tensor:
        return scored.risk_MP
