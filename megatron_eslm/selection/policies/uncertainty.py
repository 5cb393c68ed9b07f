"""The tokens that a model is least certain of, by their loss."""

from __future__ import annotations

import torch

from megatron_eslm.selection.policy import SelectionPolicy, register
from megatron_eslm.selection.scored import ScoredBatch


@register("uncertainty")
class Uncertainty(SelectionPolicy):
    """Keep the --uncertainty-quantile of tokens of highest loss, of all sequences (2503.16511).

    The objective of the same name says what is done with the others.
    """

    token_source = "head"
    holds_dropped_tokens = True
    reads = frozenset({"uncertainty_quantile"})

    def score_tokens(self, scored: ScoredBatch) -> torch.Tensor:
        return scored.risk_MP
