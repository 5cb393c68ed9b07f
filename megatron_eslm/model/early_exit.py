"""The early exit: risk of sequences by the head behind the first blocks (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.model.layers import Block, Embedding, FinalNorm, Layout
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.scored import ScoredBatch


@dataclass(frozen=True, kw_only=True)
class ExitLayers:
    """What the early exit runs: the model's own layers, or copies that a pipeline stage holds."""

    embedding: Embedding
    blocks: Sequence[Block]
    final_norm: FinalNorm


class EarlyExit:
    """Scores rows by the head behind the first blocks; holds no parameters.

    Args:
        policy: that says what a row's score is.
        layout: of the layers.
        layers: None where the policy scores without looking at the model.
        shard: of the vocabulary.
    """

    def __init__(
        self, policy: SelectionPolicy, layout: Layout, layers: ExitLayers | None, shard: VocabShard
    ) -> None:
        self.policy = policy
        self.layout = layout
        self.layers = layers
        self.shard = shard

    @torch.no_grad()
    def candidate_scores(self, batch: Batch, rows: Rows) -> torch.Tensor:
        """The proxy pass from the tokens on, without dropout; float32 [M] as `scores`."""
        if self.layers is None:
            return self.scores(batch.tokens_MU.new_empty(0), batch, rows)
        hidden_LMD = self.layers.embedding(batch.tokens_MU)
        for block in self.layers.blocks:
            hidden_LMD = block(hidden_LMD)
        return self.scores(hidden_LMD, batch, rows)

    @torch.no_grad()
    def scores(self, hidden_LMD: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        """float32 [M], higher is riskier; EXCLUDED for rows without any label.

        Args:
            hidden_LMD: behind the early exit's blocks; L is T, or this rank's share of it under
                sequence parallelism.
            batch: of the M rows.
            rows: which these are of all that are scored together.
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
            self.layers.embedding.word.weight,
            batch.labels_MT[:, ::stride].t().flatten(),
            self.shard,
            entropy=self.policy.traits.needs_entropy,
        )
        risk_MP = self.policy.token_risk(statistics).view(hidden_PMD.shape[:2]).t()
        seen_MP = valid_MT[:, ::stride]
        if stride > 1:
            # A row whose labels all fall between the scored positions is scored where they are not,
            # so that it has a score and is not dropped for ever.
            unseen_M1 = ~seen_MP.any(1, keepdim=True) & valid_MT.any(1, keepdim=True)
            seen_MP = seen_MP | unseen_M1
        labels_MP = batch.labels_MT[:, ::stride]
        reference_MP = self.policy.reference_losses(batch)[:, ::stride]
        return self.policy.sequence_scores(
            ScoredBatch(risk_MP, seen_MP, labels_MP, reference_MP, rows)
        )


def as_copy(module: nn.Module) -> None:
    """Make the parameters of a module non-persistent buffers, to be filled by `refresh_copies`.

    They then move and are cast with the model, and have no gradient, no optimizer state and no
    place in checkpoints.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach(), persistent=False)


@torch.no_grad()
def refresh_copies(layers: ExitLayers, group: dist.ProcessGroup) -> None:
    """Send the early exit's weights from the stages that train them to all. Collective.

    Args:
        layers: of this stage. The first one trains embedding and blocks, the last one the norm.
        group: the stages of a pipeline, in order.
    """
    work = []
    for source, module in (
        (0, layers.embedding),
        *((0, block) for block in layers.blocks),
        (group.size() - 1, layers.final_norm),
    ):
        # One of the two has all of them, in the order in which the layers made them.
        for tensor in [*module.parameters(), *module.buffers()]:
            sender = dist.get_global_rank(group, source)
            work.append(dist.broadcast(tensor.detach(), sender, group=group, async_op=True))
    for sent in work:
        sent.wait()
