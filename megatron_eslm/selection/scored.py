"""What a policy scores: the same for sequences and for tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_eslm.data.batch import Rows


class ScoredBatch(NamedTuple):
    """M rows of this rank at P positions: all T of them, or those that the early exit looks at."""

    risk_MP: torch.Tensor
    """float32, `SelectionPolicy.token_risk` of the early exit or of the head; zeros where no logits
    are computed for this level, and for tokens of rows that are not kept."""
    valid_MP: torch.Tensor
    """bool, which labels count."""
    labels_MP: torch.Tensor
    """int64."""
    reference_MP: torch.Tensor
    """float32, losses of the reference model; [M, 0] for policies that need none."""
    rows: Rows
    """Which rows these are of all that are scored together."""
