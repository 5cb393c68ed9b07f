"""The tokens that enter the loss, as objectives see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.ops.head.statistics import HeadStatistics, VocabShard


@dataclass(frozen=True, kw_only=True)
class LossTokens:
    """The tokens that enter the loss on this rank, as objectives see them.

    S of N = T*K tokens in (position, kept row) order; K rows of the M that were read.
    """

    normed_SD: torch.Tensor
    """[S, D] in the compute type, normalised, with gradient."""
    weight_VD: torch.Tensor
    """This rank's rows of the student's head."""
    shard: VocabShard
    labels_S: torch.Tensor
    """int64 [S]."""
    statistics: HeadStatistics
    """Of the tokens whose logits were computed."""
    scored_S: torch.Tensor | None
    """int64 [S], which of those each token is; None where they are the same."""
    kept_S: torch.Tensor | None
    """bool [S], what selection kept, for objectives that train on the others too; None: all."""
    chosen_S: torch.Tensor
    """int64 [S], which of the N each token is."""
    kept_K: torch.Tensor
    """int64 [K], rows of the batch that N counts."""
    batch: Batch
    iteration: int
    """Optimizer step under way, from 0."""
