"""The end of the model: final norm, head, and loss of the selected tokens.

Shape legend: T positions, M rows of this rank, K kept rows, N = T*K tokens in (position, row)
order, S tokens in the loss, D hidden.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_eslm.data.batch import Batch
from megatron_eslm.model.instance_selector import Selected
from megatron_eslm.model.layers import Embedding, Layout, Output
from megatron_eslm.model.token_selector import SelectedTokens, TokenSelector, num_valid_of
from megatron_eslm.objectives.base import Objective
from megatron_eslm.objectives.loss_tokens import LossTokens
from megatron_eslm.ops.head.statistics import HeadStatistics, VocabShard, head_statistics
from megatron_eslm.ops.keep_rule import indices_of
from megatron_eslm.ops.kept_tokens_mlp import LossTokenIndex
from megatron_eslm.parallel.collectives import sum_later
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.state import Recorder


class SelectiveHead(nn.Module):
    """Computes the loss from the kept rows (`instance_selector.Selected`) and their batch.

    In training, returns this rank's scaled term of the mean loss over kept tokens (float32 scalar).
    In evaluation, returns float64 [M, 2]: per row, the sum of the losses of all valid tokens and
    their number.
    """

    def __init__(
        self,
        policy: SelectionPolicy,
        recorder: Recorder,
        objective: Objective,
        layout: Layout,
        output: Embedding | Output,
        final_norm: nn.Module,
        shard: VocabShard,
        keep_logits: bool,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.recorder = recorder
        self.objective = objective
        self.selector = TokenSelector(policy, recorder)
        self.layout = layout
        self.shard = shard
        self.keep_logits = keep_logits
        self.tokens: LossTokenIndex | None = None
        """Receives the indices of tokens in the loss, for the current micro-batch."""
        # A tuple keeps the shared modules from being registered under a second name.
        self._layers = (output, final_norm)

    def forward(self, selected: Selected, batch: Batch) -> torch.Tensor:
        hidden_LKD, kept_K = selected
        hidden_TKD = self.layout.gather(hidden_LKD)
        output, final_norm = self._layers
        weight_VD = output.weight
        if not self.training:
            # Evaluate on the original tokens, not on labels permuted by --label-noise.
            labels_N = batch.tokens_MU[kept_K, 1:].t().flatten()
            valid_N = batch.valid_MT[kept_K].t().flatten()
            return self._evaluate(hidden_TKD, weight_VD, labels_N, valid_N)

        labels_N = batch.labels_MT[kept_K].t().flatten()
        valid_N = batch.valid_MT[kept_K].t().flatten()
        hidden_ND = hidden_TKD.flatten(0, 1)
        statistics = scored_S = kept_S = None
        all_valid = SelectedTokens(valid_N, num_valid_of(len(kept_K), batch), None)
        kept = all_valid
        if self.policy.drops_tokens:
            risk_KT = None
            if self.policy.traits.token_source == "head":
                # Compute logits of all tokens, select, then run backward over kept tokens only.
                with torch.no_grad():
                    statistics = self._statistics(final_norm(hidden_ND), weight_VD, labels_N)
                risk_KT = self.policy.token_risk(statistics).view(hidden_TKD.shape[:2]).t()
            kept = self.selector.select(risk_KT, kept_K, batch)
        in_loss = kept
        if self.objective.on_dropped_tokens:
            in_loss = all_valid
        # Where ranks know their own number only, it is added up while the head computes.
        count = in_loss.kept_N.sum()
        num_in_loss = sum_later(count, self.policy.peers.group, known=in_loss.total)
        chosen_S = indices_of(in_loss.kept_N, in_loss.here)
        if self.objective.on_dropped_tokens:
            kept_S = kept.kept_N[chosen_S]

        keeps_all = len(chosen_S) == len(hidden_ND)
        if self.tokens is not None:
            self.tokens.chosen_S = None if keeps_all else chosen_S
        labels_S = labels_N[chosen_S]
        normed_SD = final_norm(hidden_ND if keeps_all else hidden_ND.index_select(0, chosen_S))
        if statistics is None:
            # Selection needed no logits, so compute those of tokens in the loss only.
            statistics = self._statistics(normed_SD.detach(), weight_VD, labels_S)
        elif not keeps_all:
            scored_S = chosen_S
        self.recorder.record.num_tokens_scored = len(statistics.loss_N)

        loss_S = self.objective.token_losses(
            LossTokens(
                normed_SD=normed_SD,
                weight_VD=weight_VD,
                shard=self.shard,
                labels_S=labels_S,
                statistics=statistics,
                scored_S=scored_S,
                kept_S=kept_S,
                chosen_S=chosen_S,
                kept_K=kept_K,
                batch=batch,
                iteration=self.policy.state.iteration,
            )
        )
        self.selector.record(loss_S, chosen_S, kept.kept_N, kept_K, batch)
        # Engines average gradients over data-parallel ranks. The average of these terms is the mean
        # over the tokens of all ranks, even if ranks keep different numbers.
        with self.policy.peers.phases("count of kept tokens", waits=True):
            total = num_in_loss()
        loss = loss_S.sum() * (self.policy.peers.size / total.double().clamp(min=1.0)).float()
        # Every gradient becomes nan where a score is not finite, and the engine skips the step on
        # all ranks.
        spoilt = self.recorder.record.num_nonfinite > 0
        loss = loss * torch.where(spoilt, torch.nan, 1.0)  # type: ignore[arg-type]
        self.recorder.record.loss = loss.detach()
        return loss

    def _statistics(
        self, normed_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor
    ) -> HeadStatistics:
        return head_statistics(
            normed_ND,
            weight_VD,
            labels_N,
            self.shard,
            entropy=self.policy.traits.needs_entropy and self.policy.drops_tokens,
            keep_logits=self.keep_logits,
        )

    @torch.no_grad()
    def _evaluate(
        self,
        hidden_TMD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        valid_N: torch.Tensor,
    ) -> torch.Tensor:
        normed_ND = self._layers[1](hidden_TMD).flatten(0, 1)
        statistics = head_statistics(normed_ND, weight_VD, labels_N, self.shard, entropy=False)
        loss_N = torch.where(valid_N, statistics.loss_N, 0.0)
        both_2N = torch.stack([loss_N.double(), valid_N.double()])
        return both_2N.view(2, *hidden_TMD.shape[:2]).sum(dim=1).t()
