"""Selection of tokens at the head, and recording of each micro-batch.

Shape legend: T positions, M rows of this rank, K kept rows, N = T*K tokens in (position, row)
order, S tokens in the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.ops.keep_rule import EXCLUDED
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.scored import ScoredBatch
from megatron_eslm.selection.state import Recorder


class SelectedTokens(NamedTuple):
    """The kept ones of N tokens."""

    kept_N: torch.Tensor
    """bool."""
    total: int | None
    """Number of kept tokens over all ranks, if this rank knows it already."""


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
        scores_MT = self.policy.score_tokens(
            ScoredBatch(risk_MT, valid_MT, batch.labels_MT, reference_MT, rows)
        )
        takes_part_MT = valid_MT & in_kept_row_M[:, None]
        # Full [M, T] on every rank, so that the gather has the same shape whatever was dropped.
        decision = self.policy.keep(torch.where(takes_part_MT, scores_MT, EXCLUDED), "token gather")
        record.token_scores_MT = torch.where(takes_part_MT, scores_MT, torch.nan)
        record.tau_token = decision.tau
        record.cvar = decision.cvar
        record.num_nonfinite += decision.num_nonfinite
        known = None if self.policy.traits.ranks_decide_alone else decision.num_kept
        return SelectedTokens(decision.keep[kept_K].t().flatten(), known)

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
        record.num_tokens, record.num_tokens_in_kept_rows = torch.stack(
            [valid_MT.sum(), valid_MT[kept_K].sum()]
        ).tolist()
        record.num_tokens_kept = len(chosen_S)
        bad_S = ~torch.isfinite(loss_S)
        bad_K = torch.zeros(num_rows, dtype=torch.bool, device=loss_S.device)
        if num_rows:
            bad_K[chosen_S[bad_S] % num_rows] = True

        record.token_kept_MT = torch.zeros_like(valid_MT)
        record.token_kept_MT[kept_K] = kept_N.view(num_positions, num_rows).t()
        nonfinite_M = record.nonfinite_rows_M
        if nonfinite_M is None:
            nonfinite_M = torch.zeros_like(valid_MT[:, 0])
        nonfinite_M[kept_K] |= bad_K
        if record.token_scores_MT is not None:
            bad_MT = record.token_scores_MT.isnan() & record.token_kept_MT
            nonfinite_M |= (bad_MT | record.token_scores_MT.isinf()).any(dim=1)
        record.nonfinite_rows_M = nonfinite_M
        record.num_nonfinite = max(record.num_nonfinite, int(bad_S.sum()))
