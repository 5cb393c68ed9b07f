"""What is read in a micro-step, and what of it enters the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_eslm.ops.head_statistics import HeadStatistics, VocabShard


class Batch(NamedTuple):
    """The micro-batch of one data-parallel rank: M rows, T positions.

    A tuple of tensors, so that engines can carry it.
    """

    tokens_MS: torch.Tensor
    """int64 [M, T+1]."""
    valid_MT: torch.Tensor
    """bool [M, T], whether label t counts."""
    labels_MT: torch.Tensor
    """int64 [M, T]: the next tokens, or what --label-noise made of them."""
    reference_MT: torch.Tensor
    """float32 [M, T], losses of a reference model that were scored beforehand; else [M, 0]."""

    @classmethod
    def of(
        cls,
        tokens_MS: torch.Tensor,
        valid_MT: torch.Tensor,
        labels_MT: torch.Tensor | None = None,
        reference_MT: torch.Tensor | None = None,
    ) -> Batch:
        """A batch with the labels and the reference that it has by default."""
        if labels_MT is None:
            labels_MT = tokens_MS[:, 1:]
        if reference_MT is None:
            reference_MT = torch.empty(len(tokens_MS), 0, device=tokens_MS.device)
        return cls(tokens_MS, valid_MT, labels_MT, reference_MT)


class Rows(NamedTuple):
    """Which rows a rank has of those that are scored together, whatever the layout."""

    numbers_M: torch.Tensor
    """int64 [M], on the CPU."""
    total: int
    """Over all ranks."""


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
