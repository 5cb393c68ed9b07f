"""ESLM: the riskiest sequences, and of these the riskiest tokens."""

from __future__ import annotations

import torch

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.ops.head.statistics import HeadStatistics
from megatron_eslm.ops.keep_rule import EXCLUDED
from megatron_eslm.selection.policy import LeveledPolicy, register


@register("eslm")
class ESLM(LeveledPolicy):
    """Risk-averse selection (Algorithm 1): VaR over mean early-exit risk, then over token risk."""

    source = "head"

    @property
    def needs_entropy(self) -> bool:
        return self.options.eslm_score == "entropy"

    def token_risk(self, statistics: HeadStatistics) -> torch.Tensor:
        if self.options.eslm_score == "loss":
            return statistics.loss_N
        assert statistics.entropy_N is not None
        return statistics.entropy_N

    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        # Mean over valid positions (line 4); a row without any has no score at all.
        num_valid_M = valid_MT.sum(dim=1)
        sum_M = torch.where(valid_MT, token_risk_MT, 0.0).sum(dim=1)
        return torch.where(num_valid_M > 0, sum_M / num_valid_M.clamp(min=1), EXCLUDED)

    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        return token_risk_MT
