"""ESLM: keep the riskiest sequences, and their riskiest tokens."""

from __future__ import annotations

import torch

from megatron_eslm.ops.head.statistics import HeadStatistics
from megatron_eslm.selection.policy import SelectionPolicy, register
from megatron_eslm.selection.scored import ScoredBatch


@register("eslm")
class ESLM(SelectionPolicy):
    """Risk-averse selection (Algorithm 1): VaR over mean early-exit risk, then over token risk."""

    sequence_source = token_source = "head"
    reads = frozenset({"eslm_level", "eslm_score", "eslm_overtaken"})

    def token_risk(self, statistics: HeadStatistics) -> torch.Tensor:
        if not self.traits.needs_entropy:
            return statistics.loss_N
        assert statistics.entropy_N is not None
        return statistics.entropy_N

    def _risk(self, scored: ScoredBatch) -> torch.Tensor:
        """float32 [M, P]: loss, entropy, or loss minus that of the reference model."""
        if not self.traits.needs_reference:
            return scored.risk_MP
        # An infinite loss of the reference must not pass for a token that takes no part.
        excess_MP = scored.risk_MP - scored.reference_MP
        return torch.where(scored.reference_MP.isfinite(), excess_MP, torch.nan)

    def score_sequences(self, scored: ScoredBatch) -> torch.Tensor:
        # Mean over valid positions (line 4).
        sum_M = torch.where(scored.valid_MP, self._risk(scored), 0.0).sum(dim=1)
        return sum_M / scored.valid_MP.sum(dim=1).clamp(min=1)

    def score_tokens(self, scored: ScoredBatch) -> torch.Tensor:
        return self._risk(scored)
