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
    """float32 [M, T], losses of a reference model that were scored beforehand; else [M, 0]."""
    num_valid_M: torch.Tensor
    """int64 [M], labels that count per row; on the CPU where the host need not wait for them."""

    @classmethod
    def of(
        cls,
        tokens_MU: torch.Tensor,
        valid_MT: torch.Tensor,
        labels_MT: torch.Tensor | None = None,
        reference_MT: torch.Tensor | None = None,
        num_valid_M: torch.Tensor | None = None,
    ) -> Batch:
        """A batch with the labels, reference and counts that it has by default."""
        if labels_MT is None:
            labels_MT = tokens_MU[:, 1:]
        if reference_MT is None:
            reference_MT = torch.empty(len(tokens_MU), 0, device=tokens_MU.device)
        if num_valid_M is None:
            num_valid_M = valid_MT.sum(1)
        return cls(tokens_MU, valid_MT, labels_MT, reference_MT, num_valid_M)

    def num_valid(self) -> int:
        """Labels that count."""
        return int(self.num_valid_M.sum())

    def num_rows_with_labels(self) -> int:
        """Rows of which any label counts."""
        return int((self.num_valid_M > 0).sum())

    def num_valid_per_row(self) -> int | None:
        """Labels that count in each row, where they are as many in all."""
        first = int(self.num_valid_M[0])
        return first if bool((self.num_valid_M == first).all()) else None


class Rows(NamedTuple):
    """This rank's rows among all rows that are scored together, in any layout."""

    first: int
    """Number of its first row; the others follow."""
    num_rows: int
    total: int
    """Number of rows over all ranks."""
