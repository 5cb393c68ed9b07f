"""Input of a policy's scoring methods, the same for sequences and tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_eslm.data.batch import Rows


class ScoredBatch(NamedTuple):
    """M rows of this rank at P positions: all T, or only those that the early exit scores."""

    risk_MP: torch.Tensor
    """float32, `SelectionPolicy.token_risk` of the early exit or of the head; zeros if this level
    computes no logits, and for tokens of dropped rows."""
    valid_MP: torch.Tensor
    """bool, whether each label counts."""
    labels_MP: torch.Tensor
    """int64."""
    reference_MP: torch.Tensor
    """float32, losses of the reference model; [M, 0] for policies without one."""
    rows: Rows
    """Numbers of these rows among all rows that are scored together."""
