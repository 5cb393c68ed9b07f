"""What a policy scores, without a model."""

from __future__ import annotations

import torch

from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.scored import ScoredBatch


def scored(
    of: SelectionPolicy, valid_MT: torch.Tensor, risk_MT: torch.Tensor | None = None
) -> ScoredBatch:
    """A batch for a policy to score, as its rank would have it."""
    zeros_MT = torch.zeros(valid_MT.shape)
    return ScoredBatch(
        zeros_MT if risk_MT is None else risk_MT,
        valid_MT,
        zeros_MT.long(),
        torch.empty(len(valid_MT), 0),
        of.rows(len(valid_MT)),
    )
