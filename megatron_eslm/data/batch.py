"""Contents of a micro-batch, and which labels enter the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """The micro-batch of one data-parallel rank: M rows, T positions.

    A tuple of tensors, so that engines can pass it on.
    """

    tokens_MU: torch.Tensor
    """int64 [M, T+1]."""
    valid_MT: torch.Tensor
    """bool [M, T], whether label t counts."""
    labels_MT: torch.Tensor
    """int64 [M, T]: the next tokens, permuted in part under --label-noise."""
    reference_MT: torch.Tensor
    """float32 [M, T], stored losses of a reference model; [M, 0] without them."""

    @classmethod
    def of(
        cls,
        tokens_MU: torch.Tensor,
        valid_MT: torch.Tensor,
        labels_MT: torch.Tensor | None = None,
        reference_MT: torch.Tensor | None = None,
    ) -> Batch:
        """Build a batch; labels default to the next tokens, the reference to [M, 0]."""
        if labels_MT is None:
            labels_MT = tokens_MU[:, 1:]
        if reference_MT is None:
            reference_MT = torch.empty(len(tokens_MU), 0, device=tokens_MU.device)
        return cls(tokens_MU, valid_MT, labels_MT, reference_MT)


class Rows(NamedTuple):
    """This rank's rows among all rows that are scored together, in any layout."""

    numbers_M: torch.Tensor
    """int64 [M] row numbers, on the CPU."""
    total: int
    """Number of rows over all ranks."""
