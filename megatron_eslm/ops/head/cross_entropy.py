"""Cross-entropy of a vocabulary-parallel head over chosen tokens only.

The forward statistics of all tokens exist already when tokens are chosen (`head_statistics`); this
operation attaches the backward pass to the chosen ones. Softmax gradients and both head products
are computed for kept tokens and no others: rows are indexed, not multiplied by zero.

Shape legend: N scored tokens, K kept tokens, D hidden, V rows of this rank's shard; C tokens and W
columns of one block.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_eslm.ops.head.contract import BlockLimits, GradientBlock, HeadBackend, slices
from megatron_eslm.ops.head.dispatch import head_backend
from megatron_eslm.ops.head.statistics import CHUNK_BYTES, HeadStatistics, VocabShard
from megatron_eslm.parallel.collectives import all_reduce_

LEAST_COLUMNS = 2048
"""Of a block of logits in the backward pass, before its tokens are divided instead."""


def kept_linear_cross_entropy(
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
        chunk_bytes: most bytes of a transient block of logits.

    Returns:
        float32 [K], -log p(label) in nats. Its backward pass gives [K, D] and [V, D] gradients in
        the compute type; products accumulate in float32 over blocks. With kept logits it indexes
        them, without it recomputes them block by block.
    """
    loss_N, lse_N = statistics.loss_N, statistics.log_sum_exp_N
    return _KeptLinearCrossEntropy.apply(
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


class _KeptLinearCrossEntropy(torch.autograd.Function):
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
        hidden_KD, weight_VD, labels_K, lse_K, kept_K, logits_NV = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        local_K, here_K = shard.localise(labels_K)
        whole = GradientBlock(
            hidden_KD,
            weight_VD,
            logits_NV,
            kept_K,
            lse_K,
            torch.where(here_K, local_K, -1),
            grads[0],
            shard.num_real,
        )
        grad_hidden_KD, grad_weight_VD = _products(
            whole,
            head_backend(shard.kernel, hidden_KD.device),
            chunk_bytes=ctx.chunk_bytes,
            of_weight=ctx.needs_input_grad[1],  # else the head is frozen
        )
        if shard.group is not None and shard.group.size() > 1:
            # Every rank holds the share of its own vocabulary rows in the hidden gradient.
            all_reduce_(grad_hidden_KD, shard.group)
        return grad_hidden_KD, grad_weight_VD, *(None,) * 7


def block_shape(num_tokens: int, num_columns: int, limits: BlockLimits) -> tuple[int, int]:
    """Tokens and columns of a block of logits.

    All tokens at once where they leave room for LEAST_COLUMNS: then a block's product with the
    hidden states is final and goes straight into the weights' gradient, and only the hidden
    states' gradient, much the smaller one, is added up over blocks.
    """
    columns = min(num_columns, LEAST_COLUMNS)
    tokens = max(1, min(num_tokens, limits.numel // columns))
    columns = max(1, min(num_columns, limits.columns, limits.numel // tokens))
    # Tensor cores and vector units like their rows aligned.
    return tokens, columns if columns < 128 else columns // 128 * 128


def _products(
    whole: GradientBlock, form: HeadBackend, *, chunk_bytes: int, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients [K, D] of hidden states (this shard's share) and [V, D] of weights."""
    hidden_KD, weight_VD = whole.hidden_KD, whole.weight_WD
    num_kept, dtype = len(hidden_KD), hidden_KD.dtype
    if not num_kept or not whole.num_real:
        nothing_VD = torch.zeros_like(weight_VD) if of_weight else None
        return torch.zeros_like(hidden_KD), nothing_VD
    limits = form.block_limits(hidden_KD, chunk_bytes)
    tokens, columns = block_shape(num_kept, len(weight_VD), limits)
    token_slices = slices(num_kept, tokens)
    # Blocks of nothing but padding have no gradient.
    column_slices = [x for x in slices(len(weight_VD), columns) if x.start < whole.num_real]
    buffer = hidden_KD.new_empty(tokens * columns)
    grad_hidden_KD = torch.empty_like(hidden_KD)
    # Products of half precision are added up in float32.
    sum_CD = hidden_KD.new_empty(tokens, hidden_KD.shape[1], dtype=torch.float32)
    grad_weight_VD = torch.zeros(0)
    if of_weight:
        summed = len(token_slices) > 1
        grad_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32 if summed else dtype)
        grad_weight_VD[whole.num_real :] = 0.0

    for rows in token_slices:
        total_CD = sum_CD[: rows.stop - rows.start]
        for these in column_slices:
            shape = (len(total_CD), these.stop - these.start)
            dz_CW = buffer[: shape[0] * shape[1]].view(shape)
            form.softmax_gradient(_block(whole, rows, these), dz_CW)
            first = these.start == 0
            _add_product(dz_CW, weight_VD[these], total_CD, first=first)
            if of_weight:
                first = rows.start == 0
                _add_product(dz_CW.t(), hidden_KD[rows], grad_weight_VD[these], first=first)
        grad_hidden_KD[rows] = total_CD
    return grad_hidden_KD, grad_weight_VD.to(dtype) if of_weight else None


def _block(whole: GradientBlock, rows: slice, columns: slice) -> GradientBlock:
    kept_K, logits_NV = whole.kept_K, whole.logits_NW
    if logits_NV is not None:
        logits_NV = logits_NV[:, columns] if kept_K is not None else logits_NV[rows, columns]
    return GradientBlock(
        whole.hidden_KD[rows],
        whole.weight_WD[columns],
        logits_NV,
        None if kept_K is None else kept_K[rows],
        whole.lse_K[rows],
        whole.column_K[rows] - columns.start,
        whole.grad_K[rows],
        min(columns.stop, whole.num_real) - columns.start,
    )


def _add_product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor, *, first: bool) -> None:
    """total (+)= a @ b."""
    if total.dtype != a.dtype:
        product = a @ b
        if first:
            total.copy_(product)
        else:
            total += product
    elif first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)
