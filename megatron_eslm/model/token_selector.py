"""Selection of tokens at the head, and recording of each micro-batch.

Shape legend: T positions, M rows of this rank, K kept rows, N = T*K tokens in (position, row)
order, S tokens in the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.scored import ScoredBatch
from megatron_eslm.selection.state import Recorder


class SelectedTokens(NamedTuple):
    """The kept ones of N tokens."""

    kept_N: torch.Tensor
    """bool."""
    here: int | None
    """Their number on this rank, where the host knows it without waiting for the device."""
    total: torch.Tensor | None
    """Their number over all ranks, where this rank has it already."""


def num_valid_of(num_kept: int, batch: Batch) -> int | None:
    """Labels that count in `num_kept` rows of a batch, where the host knows without waiting."""
    if num_kept == len(batch.valid_MT):
        return batch.num_valid()
    per_row = batch.num_valid_per_row()
    return None if per_row is None else num_kept * per_row


class TokenSelector:
    """Selects the tokens of the kept rows that enter the loss, and records them."""

    def __init__(self, policy: SelectionPolicy, recorder: Recorder) -> None:
        self.policy = policy
        self.recorder = recorder

    @torch.no_grad()
    def select(
        self, risk_KT: torch.Tensor | None, kept_K: torch.Tensor, batch: Batch
    ) -> SelectedTokens:
        """Apply the keep rule. Collective under a global scope.

        Args:
            risk_KT: float32, risk from the head; None if the policy needs none.
            kept_K: int64, the kept rows of the batch.
            batch: all M rows.
        """
        valid_MT = batch.valid_MT
        record = self.recorder.record
        in_kept_row_M = torch.zeros(len(valid_MT), dtype=torch.bool, device=valid_MT.device)
        in_kept_row_M[kept_K] = True
        risk_MT = torch.zeros(valid_MT.shape, dtype=torch.float32, device=valid_MT.device)
        if risk_KT is not None:
            risk_MT[kept_K] = risk_KT
        rows, reference_MT = self.policy.rows(len(valid_MT)), self.policy.reference_losses(batch)
        takes_part_MT = valid_MT & in_kept_row_M[:, None]
        scores_MT = self.policy.token_scores(
            ScoredBatch(risk_MT, valid_MT, batch.labels_MT, reference_MT, rows), takes_part_MT
        )
        # Full [M, T] on every rank, so that one gather of one shape serves whatever was dropped.
        decision = self.policy.keep(scores_MT, "token gather")
        record.token_scores_MT = torch.where(takes_part_MT, scores_MT, torch.nan)
        record.tau_token, record.cvar = decision.numbers[:2]
        record.num_nonfinite = record.num_nonfinite + decision.numbers[4]
        alone = self.policy.traits.ranks_decide_alone
        return SelectedTokens(
            decision.keep[kept_K].t().flatten(),
            self._known(len(kept_K), batch) if alone or self.policy.peers.size == 1 else None,
            None if alone else decision.numbers[3],
        )

    def _known(self, num_kept: int, batch: Batch) -> int | None:
        """How many tokens this rank keeps of `num_kept` rows, where the host can tell."""
        valid = num_valid_of(num_kept, batch) if self.policy.keeps_by_rule else None
        return None if valid is None else num_to_keep(valid, self.policy.state.alpha)

    @torch.no_grad()
    def record(
        self,
        loss_S: torch.Tensor,
        chosen_S: torch.Tensor,
        kept_N: torch.Tensor,
        kept_K: torch.Tensor,
        batch: Batch,
    ) -> None:
        """Record counts, kept tokens and non-finite rows.

        Args:
            loss_S: losses of the tokens in the loss.
            chosen_S: int64, indices of these tokens among the N.
            kept_N: bool, the tokens that `select` kept.
            kept_K: int64, the kept rows.
            batch: all M rows.
        """
        record, valid_MT = self.recorder.record, batch.valid_MT
        num_rows, num_positions = len(kept_K), valid_MT.shape[1]
        record.num_tokens = batch.num_valid()
        known = num_valid_of(num_rows, batch)
        record.num_tokens_in_kept_rows = valid_MT[kept_K].sum() if known is None else known
        record.num_tokens_kept = len(chosen_S)
        bad_S = ~torch.isfinite(loss_S)
        bad_K = torch.zeros(num_rows, dtype=torch.float32, device=loss_S.device)
        if num_rows:
            bad_K.index_add_(0, chosen_S % num_rows, bad_S.float())

        record.token_kept_MT = torch.zeros_like(valid_MT)
        record.token_kept_MT[kept_K] = kept_N.view(num_positions, num_rows).t()
        nonfinite_M = record.nonfinite_rows_M
        if nonfinite_M is None:
            nonfinite_M = torch.zeros_like(valid_MT[:, 0])
        nonfinite_M[kept_K] |= bad_K > 0
        if record.token_scores_MT is not None:
            bad_MT = record.token_scores_MT.isnan() & record.token_kept_MT
            nonfinite_M |= (bad_MT | record.token_scores_MT.isinf()).any(dim=1)
        record.nonfinite_rows_M = nonfinite_M
        record.num_nonfinite = bad_S.sum().clamp(min=record.num_nonfinite)
