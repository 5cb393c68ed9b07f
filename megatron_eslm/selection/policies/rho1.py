"""Rho-1: keep the tokens whose loss exceeds that of a reference model by most."""

from __future__ import annotations

import torch

from megatron_eslm.selection.policy import SelectionPolicy, register
from megatron_eslm.selection.scored import ScoredBatch


@register("rho1")
class Rho1(SelectionPolicy):
    """Selective language modelling (Lin et al. 2024, "Rho-1: Not All Tokens Are What You Need").

    A token's score is its excess loss l_theta - l_ref (eq. 3 there); the 1 - alpha of largest
    excess enter the loss (eqs. 4 and 5, with k% = 1 - alpha). All sequences are read in full.
    """

    token_source = "head"
    needs_reference = True

    def score_tokens(self, scored: ScoredBatch) -> torch.Tensor:
        excess_MP = scored.risk_MP - scored.reference_MP
        # An infinite loss of the reference must not pass for a token that takes no part.
        return torch.where(scored.reference_MP.isfinite(), excess_MP, torch.nan)
