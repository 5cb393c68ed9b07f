"""Plain causal language modelling."""

from __future__ import annotations

import torch

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.selection.policy import SelectionPolicy, register


@register("clm")
class CausalLM(SelectionPolicy):
    """Plain causal language modelling: every sequence, every token."""

    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        raise AssertionError("clm scores nothing")

    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        raise AssertionError("clm scores nothing")
