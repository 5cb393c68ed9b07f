"""Rho-1: keep the tokens whose loss exceeds a reference model's loss most."""

from __future__ import annotations

import torch

from megatron_eslm.selection.policy import SelectionPolicy, register
from megatron_eslm.selection.scored import ScoredBatch


@register("rho1")
class Rho1(SelectionPolicy):
    """Selective language modelling (Lin et al. 2024, "Rho-1: Not All Tokens Are What You Need").

    A token's score is its excess loss l_theta - l_ref (eq. 3 there). The share 1 - alpha of tokens
    with the largest excess enters the loss (eqs. 4 and 5, with k% = 1 - alpha). No sequences are
    dropped.
    """

    token_source = "head"
    needs_reference = True

    def score_tokens(self, scored: ScoredBatch) -> torch.Tensor:
        excess_MP = scored.risk_MP - scored.reference_MP
        # An infinite reference loss would give -inf, the score of an excluded token.
        return torch.where(scored.reference_MP.isfinite(), excess_MP, torch.nan)
