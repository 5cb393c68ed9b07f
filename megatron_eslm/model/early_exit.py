"""The early exit: score sequences by applying the head after the first blocks (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.data.documents import CAUSAL, DocumentRules
from megatron_eslm.model.layers import Block, Embedding, Layout, Output
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.scored import ScoredBatch


@dataclass(frozen=True, kw_only=True)
class ExitLayers:
    """Layers of the early exit: the model's own, or copies held by a pipeline stage."""

    embedding: Embedding
    blocks: Sequence[Block]
    final_norm: nn.Module
    output: Embedding | Output
    """Its weight is the head; the embedding if the head is tied."""


class EarlyExit:
    """Scores rows by applying the head after the first blocks; has no parameters.

    Args:
        policy: computes the scores.
        layout: layout of the layers.
        layers: None if the policy scores without the model.
        shard: vocabulary shard of this rank.
        documents: keep attention or positions inside documents, as the model does.
    """

    def __init__(
        self,
        policy: SelectionPolicy,
        layout: Layout,
        layers: ExitLayers | None,
        shard: VocabShard,
        documents: DocumentRules | None = None,
    ) -> None:
        self.policy = policy
        self.layout = layout
        self.layers = layers
        self.shard = shard
        self.documents = documents

    @torch.no_grad()
    def candidate_scores(self, batch: Batch, rows: Rows) -> torch.Tensor:
        """Run the proxy pass from the tokens on, without dropout; float32 [M] as `scores`."""
        if self.layers is None:
            return self.scores(batch.tokens_MU.new_empty(0), batch, rows)
        rules = self.documents
        documents = CAUSAL if rules is None else rules.of(batch.tokens_MU)
        hidden_LMD = self.layers.embedding(batch.tokens_MU, None, documents)
        for block in self.layers.blocks:
            hidden_LMD = block(hidden_LMD, None, None, documents)
        return self.scores(hidden_LMD, batch, rows)

    @torch.no_grad()
    def scores(self, hidden_LMD: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        """Score rows: float32 [M], higher is riskier; EXCLUDED for rows without any label.

        Args:
            hidden_LMD: output of the early exit's blocks; L is T, or this rank's share of it under
                sequence parallelism.
            batch: the M rows.
            rows: numbers of these rows among all rows that are scored together.
        """
        valid_MT, stride = batch.valid_MT, self.policy.traits.proxy_stride
        if self.layers is None:
            nothing_MT = torch.zeros(valid_MT.shape, device=valid_MT.device)
            return self.policy.sequence_scores(
                ScoredBatch(
                    nothing_MT, valid_MT, batch.labels_MT, self.policy.reference_losses(batch), rows
                )
            )
        # P: the positions that are scored.
        hidden_PMD = self.layers.final_norm(self.layout.gather(hidden_LMD.detach())[::stride])
        statistics = head_statistics(
            hidden_PMD.flatten(0, 1),
            self.layers.output.weight,
            batch.labels_MT[:, ::stride].t().flatten(),
            self.shard,
            entropy=self.policy.traits.needs_entropy,
        )
        risk_MP = self.policy.token_risk(statistics).view(hidden_PMD.shape[:2]).t()
        seen_MP = valid_MT[:, ::stride]
        if stride > 1:
            # If all labels of a row fall between the scored positions, score the row at all scored
            # positions. Without a score it would be dropped every time.
            unseen_M1 = ~seen_MP.any(1, keepdim=True) & valid_MT.any(1, keepdim=True)
            seen_MP = seen_MP | unseen_M1
        labels_MP = batch.labels_MT[:, ::stride]
        reference_MP = self.policy.reference_losses(batch)[:, ::stride]
        return self.policy.sequence_scores(
            ScoredBatch(risk_MP, seen_MP, labels_MP, reference_MP, rows)
        )


def as_copy(module: nn.Module) -> None:
    """Turn a module's parameters into non-persistent buffers, to be filled by `refresh_copies`.

    Buffers move and are cast with the model, but have no gradient and no optimizer state and are
    not saved in checkpoints.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach(), persistent=False)


@torch.no_grad()
def refresh_copies(layers: ExitLayers, group: dist.ProcessGroup) -> None:
    """Broadcast the early exit's weights from the stages that train them to all. Collective.

    Args:
        layers: this stage's layers. The first stage trains embedding and blocks, the last one norm
            and untied head.
        group: the stages of a pipeline, in order.
    """
    work = []
    for source, module in (
        (0, layers.embedding),
        *((0, block) for block in layers.blocks),
        (group.size() - 1, layers.final_norm),
        *((group.size() - 1, end) for end in [layers.output] if end is not layers.embedding),
    ):
        # A module has only parameters or only buffers, in the order of creation.
        for tensor in [*module.parameters(), *module.buffers()]:
            sender = dist.get_global_rank(group, source)
            work.append(dist.broadcast(tensor.detach(), sender, group=group, async_op=True))
    for sent in work:
        sent.wait()
