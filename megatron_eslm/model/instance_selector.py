"""In-model selection of sequences: one pass instead of Algorithm 1's two.

Within a step the weights do not change, so the early exit's blocks need not run twice. This layer
follows them, scores their output without gradient and passes on the riskiest rows. The gradients
are exactly those of Algorithm 1 with the micro-batch as its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from megatron_eslm.data.batch import Batch
from megatron_eslm.model.early_exit import EarlyExit
from megatron_eslm.ops.keep_rule import indices_of, num_to_keep
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.state import Recorder


class Selected(NamedTuple):
    """The rows that continue through the model."""

    hidden_LKD: torch.Tensor
    """Hidden states of the kept rows."""
    kept_K: torch.Tensor
    """int64, indices of the kept rows among this rank's rows."""


class InstanceSelector(nn.Module):
    """Drops rows: (hidden [L, M, D], batch) -> Selected.

    L is T, or this rank's share of it under sequence parallelism. K may be 0 on a rank. All rows
    are kept in evaluation and in micro-steps that drop nothing.
    """

    def __init__(self, policy: SelectionPolicy, recorder: Recorder, early_exit: EarlyExit) -> None:
        super().__init__()
        self.policy = policy
        self.recorder = recorder
        self.early_exit = early_exit

    def forward(self, hidden_LMD: torch.Tensor, batch: Batch) -> Selected:
        rows = hidden_LMD.shape[1]
        everything_M = torch.arange(rows, device=hidden_LMD.device)
        if not self.training:
            return Selected(hidden_LMD, everything_M)
        record = self.recorder.record
        record.num_rows = record.num_rows_kept = rows
        if not self.policy.drops_rows(rows):
            return Selected(hidden_LMD, everything_M)

        scores_M = self.early_exit.scores(hidden_LMD, batch, self.policy.rows(rows))
        kept = self.policy.keep(scores_M, "proxy gather")
        record.instance_scores_M = scores_M
        record.instance_kept_M = kept.keep
        record.tau_instance = kept.numbers[0]
        record.num_nonfinite = kept.numbers[4]
        record.nonfinite_rows_M = torch.isnan(scores_M) | (scores_M == torch.inf)
        known = None
        alone = self.policy.traits.ranks_decide_alone or self.policy.peers.size == 1
        if alone and self.policy.keeps_by_rule:
            known = num_to_keep(batch.num_rows_with_labels(), self.policy.state.alpha)
        kept_K = indices_of(kept.keep, known)
        record.num_rows_kept = len(kept_K)
        if len(kept_K) == rows:
            return Selected(hidden_LMD, kept_K)
        return Selected(hidden_LMD.index_select(1, kept_K), kept_K)
