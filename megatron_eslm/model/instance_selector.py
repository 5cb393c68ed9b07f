"""Selection of sequences in mid-model: one pass instead of Algorithm 1's two.

Within a step the weights are the same, so the early exit's blocks need not run twice: this layer
stands after them, scores their output without gradient and lets the riskiest rows through. The
gradients are exactly those of Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_eslm.model.layers import Carry, Embedding
from megatron_eslm.ops.head_statistics import VocabShard, head_statistics
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.state import Recorder


class InstanceSelector(nn.Module):
    """(hidden [T,M,D], tokens [M,T+1], valid [M,T]) -> (hidden [T,K,D], kept row indices [K]).

    K may be 0 on a rank. Evaluation keeps all rows.
    """

    def __init__(
        self,
        policy: SelectionPolicy,
        recorder: Recorder,
        embedding: Embedding,
        final_norm: nn.Module,
        shard: VocabShard,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.recorder = recorder
        self.shard = shard
        # In a tuple, so that the shared modules are not registered under a second name.
        self._early_exit = (embedding, final_norm)

    def forward(self, carry: Carry) -> Carry:
        hidden_TMD, tokens_MS, valid_MT = carry
        rows = hidden_TMD.shape[1]
        everything_M = torch.arange(rows, device=hidden_TMD.device)
        if not self.training:
            return hidden_TMD, everything_M
        record = self.recorder.record
        record.num_rows = record.num_rows_kept = rows
        if self.policy.instance_source == "nothing":
            return hidden_TMD, everything_M

        scores_M = self._scores(hidden_TMD.detach(), tokens_MS[:, 1:], valid_MT)
        kept = self.policy.keep(scores_M)
        record.instance_scores_M = scores_M
        record.instance_kept_M = kept.keep
        record.tau_instance = kept.tau
        record.num_nonfinite += kept.num_nonfinite
        record.nonfinite_rows_M = torch.isnan(scores_M) | (scores_M == torch.inf)
        kept_K = kept.keep.nonzero().squeeze(1)
        record.num_rows_kept = len(kept_K)
        if len(kept_K) == rows:
            return hidden_TMD, kept_K
        return hidden_TMD.index_select(1, kept_K), kept_K

    @torch.no_grad()
    def _scores(
        self, hidden_TMD: torch.Tensor, labels_MT: torch.Tensor, valid_MT: torch.Tensor
    ) -> torch.Tensor:
        if self.policy.instance_source == "policy":
            return self.policy.instance_scores(hidden_TMD.new_empty(0), valid_MT)
        embedding, final_norm = self._early_exit
        stride = self.policy.proxy_stride
        hidden_SMD = final_norm(hidden_TMD[::stride])
        labels_MS = labels_MT[:, ::stride]
        statistics = head_statistics(
            hidden_SMD.flatten(0, 1),
            embedding.word.weight,
            labels_MS.t().flatten(),
            self.shard,
            entropy=self.policy.needs_entropy,
        )
        risk_MS = self.policy.token_risk(statistics).view(hidden_SMD.shape[:2]).t()
        seen_MS = valid_MT[:, ::stride]
        if stride > 1:
            # A row whose labels all fall between the scored positions is scored where they are not,
            # so that it has a score and is not dropped for ever.
            unseen_M1 = ~seen_MS.any(1, keepdim=True) & valid_MT.any(1, keepdim=True)
            seen_MS = seen_MS | unseen_M1
        return self.policy.instance_scores(risk_MS, seen_MS)
