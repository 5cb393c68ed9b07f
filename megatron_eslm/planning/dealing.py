"""Kept rows dealt evenly to ranks (ops/balance_rows.py): how many change hands, on average."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_eslm.config.run import RunConfig
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.planning.imbalance import expected_busiest, expected_moves
from megatron_eslm.selection.policy import SelectionPolicy


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """The rows of one micro-step."""

    num_kept: int
    """Over all ranks."""
    num_read: int
    """Over all ranks."""
    ranks: int
    num_moved: float
    """Rows that change hands, over all ranks."""
    busiest: float
    """Of them, those that the rank with most of them sends or receives."""

    @property
    def largest(self) -> int:
        """Rows of the ranks that have most."""
        return math.ceil(self.num_kept / self.ranks)

    @classmethod
    def of(cls, run: RunConfig, policy: SelectionPolicy) -> Dealing | None:
        """That of a run; None where rows stay where they were read."""
        rows, ranks = run.training.micro_batch_size, run.dp_size
        if not policy.deals_rows:
            return None
        assert rows
        kept = num_to_keep(rows * ranks, run.selection.initial_alpha)
        return cls(
            num_kept=kept,
            num_read=rows * ranks,
            ranks=ranks,
            num_moved=expected_moves(kept, rows, ranks),
            busiest=expected_busiest(kept, rows, ranks),
        )
