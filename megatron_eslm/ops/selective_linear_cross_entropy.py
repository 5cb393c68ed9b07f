"""Cross-entropy of a vocabulary-parallel head over chosen tokens only.

The forward statistics of all tokens exist already when tokens are chosen (`head_statistics`); this
operation attaches the backward pass to the chosen ones. Softmax gradients and both head products
are computed for kept tokens and no others: rows are indexed, not multiplied by zero.

Shape legend: N scored tokens, K kept tokens, D hidden, V rows of this rank's shard, C one chunk.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_eslm.ops.head_statistics import (
    CHUNK_BYTES,
    HeadStatistics,
    VocabShard,
    chunk_rows,
)
from megatron_eslm.parallel.collectives import all_reduce_


def selective_linear_cross_entropy(
    hidden_KD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_K: torch.Tensor,
    kept_K: torch.Tensor | None,
    statistics: HeadStatistics,
    shard: VocabShard,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Losses of the kept tokens, with gradients for hidden states and, unless frozen, head.

    Args:
        hidden_KD: [K, D] normalised hidden states of the kept tokens, in the compute type.
        weight_VD: [V, D] this rank's rows of the head, same type.
        labels_K: int64 [K], global token ids of the kept tokens.
        kept_K: int64 [K], which of the N scored tokens they are; None when they are all of them.
        statistics: of the N scored tokens, from the same hidden states and weights.
        shard: which rows of the vocabulary these are.

    Returns:
        float32 [K], -log p(label) in nats. Its backward pass gives [K, D] and [V, D] gradients in
        the compute type; products accumulate in float32 over chunks. With kept logits it indexes
        them, without it recomputes them chunk by chunk.
    """
    loss_N, lse_N = statistics.loss_N, statistics.log_sum_exp_N
    return _SelectiveLinearCrossEntropy.apply(
        hidden_KD,
        weight_VD,
        labels_K,
        loss_N if kept_K is None else loss_N[kept_K],
        lse_N if kept_K is None else lse_N[kept_K],
        kept_K,
        statistics.logits_NV,
        shard,
        chunk_bytes,
    )


class _SelectiveLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_K: torch.Tensor,
        loss_K: torch.Tensor,
        lse_K: torch.Tensor,
        kept_K: torch.Tensor | None,
        logits_NV: torch.Tensor | None,
        shard: VocabShard,
        chunk_bytes: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_KD, weight_VD, labels_K, lse_K, kept_K, logits_NV)
        ctx.shard, ctx.chunk_bytes = shard, chunk_bytes
        return loss_K.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_K,) = grads
        hidden_KD, weight_VD, labels_K, lse_K, kept_K, logits_NV = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        num_kept = hidden_KD.shape[0]
        grad_hidden_KD = torch.empty_like(hidden_KD)
        grad_weight_VD = None
        if ctx.needs_input_grad[1]:  # else the head is frozen
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        local_K, here_K = shard.localise(labels_K)

        step = chunk_rows(shard.num_rows, ctx.chunk_bytes)
        for start in range(0, num_kept, step):
            rows = slice(start, min(start + step, num_kept))
            if logits_NV is None:
                logits_CV = hidden_KD[rows] @ weight_VD.t()
            else:
                logits_CV = logits_NV[rows] if kept_K is None else logits_NV[kept_K[rows]]
            # d loss / d z = softmax(z) - onehot(label), zero in the padding columns.
            real = shard.num_real
            dz_CV = torch.zeros_like(logits_CV, dtype=torch.float32)
            torch.sub(logits_CV[:, :real], lse_K[rows, None], out=dz_CV[:, :real]).exp_()
            dz_CV.scatter_add_(1, local_K[rows, None], -here_K[rows, None].float())
            dz_CV *= grad_K[rows, None]
            dz_CV = dz_CV.to(hidden_KD.dtype)
            torch.mm(dz_CV, weight_VD, out=grad_hidden_KD[rows])
            if grad_weight_VD is None:
                continue
            if weight_VD.dtype == torch.float32:
                grad_weight_VD.addmm_(dz_CV.t(), hidden_KD[rows])
            else:
                grad_weight_VD += dz_CV.t() @ hidden_KD[rows]

        if shard.group is not None and shard.group.size() > 1:
            # Every rank holds the share of its own vocabulary rows in the hidden gradient.
            all_reduce_(grad_hidden_KD, shard.group)
        return (
            grad_hidden_KD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            *(None,) * 7,
        )
