"""Selection of sequences in mid-model: one pass instead of Algorithm 1's two.

Within a step the weights are the same, so the early exit's blocks need not run twice: this layer
stands after them, scores their output without gradient and lets the riskiest rows through. The
gradients are exactly those of Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_eslm.model.layers import Embedding, FinalNorm, Layout, MirroredNorm
from megatron_eslm.ops.balance_rows import balance_rows, plan_rows
from megatron_eslm.ops.head_statistics import VocabShard, head_statistics
from megatron_eslm.selection.batch import Batch
from megatron_eslm.selection.policy import Held, SelectionPolicy
from megatron_eslm.selection.state import Recorder

Selected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What goes on through the model, and from stage to stage of a pipeline: hidden [S,K,D] of the kept
rows, which of this rank's rows they are (int64 [K]), and int64 [2] with the number of rows that
were read (M) and of scores that were not finite.

Where kept rows are dealt to ranks the indices are those of the global micro-batch, and behind the
two counts stands which of its rows are kept, so that each stage knows who has which."""


def held_rows(facts: torch.Tensor, rank: int, num_ranks: int) -> Held:
    """Who has which rows, from the third of `Selected` where rows are dealt."""
    return Held(plan_rows(facts[2:].view(num_ranks, -1).bool()), rank)


class InstanceSelector(nn.Module):
    """(hidden [S,M,D], batch) -> Selected.

    S is T, or this rank's share of it under sequence parallelism. K may be 0 on a rank. Evaluation
    keeps all rows.
    """

    def __init__(
        self,
        policy: SelectionPolicy,
        recorder: Recorder,
        layout: Layout,
        embedding: Embedding,
        final_norm: FinalNorm | MirroredNorm | None,
        shard: VocabShard,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.recorder = recorder
        self.layout = layout
        self.shard = shard
        # In a tuple, so that the shared modules are not registered under a second name.
        self._early_exit = (embedding, final_norm)

    def forward(self, hidden_SMD: torch.Tensor, batch: Batch) -> Selected:
        rows = hidden_SMD.shape[1]
        everything_M = torch.arange(rows, device=hidden_SMD.device)
        if not self.training or self.policy.instance_source == "nothing":
            if self.training:
                self.recorder.record.num_rows = self.recorder.record.num_rows_kept = rows
            return hidden_SMD, everything_M, everything_M.new_tensor([rows, 0])

        scores_M = self._scores(hidden_SMD.detach(), batch.labels_MT, batch.valid_MT)
        kept = self.policy.keep(scores_M, "proxy gather")
        record = self.recorder.record
        record.num_rows = rows
        record.instance_scores_M = scores_M
        record.instance_kept_M = kept.keep
        record.tau_instance = kept.tau
        record.num_nonfinite = kept.num_nonfinite
        record.nonfinite_rows_M = torch.isnan(scores_M) | (scores_M == torch.inf)
        kept_K = kept.keep.nonzero().squeeze(1)
        record.num_rows_kept = len(kept_K)
        facts_2 = kept_K.new_tensor([rows, kept.num_nonfinite])
        if self.policy.deals_rows:
            return self._deal(hidden_SMD, kept_K, facts_2, kept.everyone)
        if len(kept_K) == rows:
            return hidden_SMD, kept_K, facts_2
        return hidden_SMD.index_select(1, kept_K), kept_K, facts_2

    def _deal(
        self,
        hidden_SMD: torch.Tensor,
        kept_K: torch.Tensor,
        facts_2: torch.Tensor,
        everyone_RM: torch.Tensor,
    ) -> Selected:
        peers = self.policy.peers
        facts = torch.cat([facts_2, everyone_RM.flatten().long()])
        held = held_rows(facts, peers.rank, peers.size)
        rows_B = held.rows_B.to(kept_K.device)
        if not held.plan.moves_any:
            everything = len(kept_K) == hidden_SMD.shape[1]
            hidden_SKD = hidden_SMD if everything else hidden_SMD.index_select(1, kept_K)
            return hidden_SKD, rows_B, facts
        hidden_KSD = hidden_SMD.index_select(1, kept_K).transpose(0, 1)
        with peers.phases("exchange of rows", waits=True):
            hidden_BSD = balance_rows(hidden_KSD, held.plan, peers.group)
        return hidden_BSD.transpose(0, 1).contiguous(), rows_B, facts

    @torch.no_grad()
    def _scores(
        self, hidden_SMD: torch.Tensor, labels_MT: torch.Tensor, valid_MT: torch.Tensor
    ) -> torch.Tensor:
        if self.policy.instance_source == "policy":
            return self.policy.instance_scores(hidden_SMD.new_empty(0), valid_MT)
        embedding, final_norm = self._early_exit
        assert final_norm is not None
        stride = self.policy.proxy_stride
        # P: the positions that are scored.
        hidden_PMD = final_norm(self.layout.gather(hidden_SMD)[::stride])
        labels_MP = labels_MT[:, ::stride]
        statistics = head_statistics(
            hidden_PMD.flatten(0, 1),
            embedding.word.weight,
            labels_MP.t().flatten(),
            self.shard,
            entropy=self.policy.needs_entropy,
        )
        risk_MP = self.policy.token_risk(statistics).view(hidden_PMD.shape[:2]).t()
        seen_MP = valid_MT[:, ::stride]
        if stride > 1:
            # A row whose labels all fall between the scored positions is scored where they are not,
            # so that it has a score and is not dropped for ever.
            unseen_M1 = ~seen_MP.any(1, keepdim=True) & valid_MT.any(1, keepdim=True)
            seen_MP = seen_MP | unseen_M1
        return self.policy.instance_scores(risk_MP, seen_MP)
