"""Input of objectives: the tokens that enter the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.ops.head.statistics import HeadStatistics, VocabShard


@dataclass(frozen=True, kw_only=True)
class LossTokens:
    """The tokens that enter the loss on this rank.

    S of the N = T*K tokens in (position, kept row) order; K kept rows of the M that were read.
    """

    normed_SD: torch.Tensor
    """[S, D] hidden states after the final norm, in the compute dtype, with gradient."""
    weight_VD: torch.Tensor
    """This rank's rows of the student's head."""
    shard: VocabShard
    labels_S: torch.Tensor
    """int64 [S]."""
    statistics: HeadStatistics
    """Statistics of all tokens whose logits were computed."""
    scored_S: torch.Tensor | None
    """int64 [S], index of each token in `statistics`; None if these are the same tokens."""
    kept_S: torch.Tensor | None
    """bool [S], whether selection kept each token, for objectives that also train on dropped
    tokens; None: all were kept."""
    chosen_S: torch.Tensor
    """int64 [S], index of each token among the N."""
    kept_K: torch.Tensor
    """int64 [K], kept rows of the batch."""
    batch: Batch
    iteration: int
    """Current optimizer step, from 0."""
