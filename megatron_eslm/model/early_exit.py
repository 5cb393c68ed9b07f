"""The early exit: risk of sequences by the head behind the first blocks (Algorithm 1)."""

from __future__ import annotations

import torch

from megatron_eslm.model.layers import Embedding, FinalNorm, Layout, MirroredNorm
from megatron_eslm.ops.head_statistics import VocabShard, head_statistics
from megatron_eslm.selection.batch import Batch, Rows
from megatron_eslm.selection.policy import SelectionPolicy


class EarlyExit:
    """(hidden states behind the early exit's blocks, batch, rows) -> score of each row.

    Uses the model's own embedding and final norm; holds no parameters.
    """

    def __init__(
        self,
        policy: SelectionPolicy,
        layout: Layout,
        embedding: Embedding,
        final_norm: FinalNorm | MirroredNorm | None,
        shard: VocabShard,
    ) -> None:
        self.policy = policy
        self.layout = layout
        self.embedding = embedding
        self.final_norm = final_norm
        self.shard = shard

    @torch.no_grad()
    def scores(self, hidden_SMD: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        """float32 [M], higher is riskier; EXCLUDED for rows without any label.

        Args:
            hidden_SMD: S is T, or this rank's share of it under sequence parallelism.
            batch: of the M rows.
            rows: which these are of all that are scored together.
        """
        valid_MT = batch.valid_MT
        if self.policy.instance_source == "policy":
            return self.policy.instance_scores(hidden_SMD.new_empty(0), valid_MT, rows)
        assert self.final_norm is not None
        stride = self.policy.proxy_stride
        # P: the positions that are scored.
        hidden_PMD = self.final_norm(self.layout.gather(hidden_SMD.detach())[::stride])
        statistics = head_statistics(
            hidden_PMD.flatten(0, 1),
            self.embedding.word.weight,
            batch.labels_MT[:, ::stride].t().flatten(),
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
        return self.policy.instance_scores(risk_MP, seen_MP, rows)
