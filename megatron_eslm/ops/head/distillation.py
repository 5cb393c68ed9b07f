"""Distillation through two vocabulary-parallel heads, over selected tokens only.

Source: line 7 of Algorithm 3 of the ESLM paper. Logits of student and teacher are never gathered or
kept in float32, and exist for one chunk of tokens at a time (except student logits that the
statistics keep anyway). The backward pass recomputes the teacher's logits.

Shape legend: N scored tokens, S selected tokens, D hidden size of the student, E of the teacher, V
rows of this rank's shard, C tokens of one chunk, R rows of V without vocabulary padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_eslm.ops.head.statistics import (
    CHUNK_BYTES,
    HeadStatistics,
    VocabShard,
    chunk_rows,
)
from megatron_eslm.parallel.collectives import all_reduce_


def selective_distillation(
    hidden_SD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_S: torch.Tensor,
    scored_S: torch.Tensor | None,
    statistics: HeadStatistics,
    teacher_SE: torch.Tensor,
    teacher_weight_VE: torch.Tensor,
    shard: VocabShard,
    *,
    kl_weight: float | torch.Tensor,
    temperature: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Compute w KL(teacher || student) + (1 - w) (-log p(label)) of the selected tokens.

    KL = sum p_t (log p_t - log p_s) with both distributions softmax(z / temperature), without the
    factor temperature^2 that some authors add; the label term is at temperature 1.

    Runs two collectives over the shard's group for any S: MAX of both heads' maxima, then one SUM
    of three numbers per token.

    Args:
        hidden_SD: [S, D] normalised hidden states of the selected tokens, in the compute dtype.
        weight_VD: [V, D] this rank's rows of the student's head, same dtype.
        labels_S: int64 [S], global token ids.
        scored_S: int64 [S], indices of the tokens among the N scored ones; None if all are
            selected.
        statistics: statistics of the N scored tokens, from the same hidden states and weights.
        teacher_SE: [S, E] the teacher's normalised hidden states of the same tokens, any dtype.
        teacher_weight_VE: [V, E] the same vocabulary rows of the teacher's head, same dtype as
            teacher_SE. The teacher gets no gradient.
        shard: this rank's vocabulary rows.
        kl_weight: w, in [0, 1]: one number, or float32 [S].
        temperature: above 0.
        chunk_bytes: size of the transient float32 logits of both heads together.

    Returns:
        float32 [S] in nats. Its backward pass gives [S, D] and [V, D] gradients in the compute
        dtype; products accumulate in float32 over chunks.
    """
    loss_N, lse_N = statistics.loss_N, statistics.log_sum_exp_N
    kl_weight_S = (
        kl_weight.float()
        if isinstance(kl_weight, torch.Tensor)
        else torch.full((), kl_weight, device=loss_N.device)
    )
    return _SelectiveDistillation.apply(
        hidden_SD,
        weight_VD,
        labels_S,
        scored_S,
        loss_N if scored_S is None else loss_N[scored_S],
        lse_N if scored_S is None else lse_N[scored_S],
        statistics.logits_NV,
        teacher_SE.detach(),
        teacher_weight_VE.detach(),
        kl_weight_S.expand(len(labels_S)),
        temperature,
        shard,
        chunk_bytes,
    )


class _SelectiveDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_S: torch.Tensor,
        scored_S: torch.Tensor | None,
        loss_S: torch.Tensor,
        lse_S: torch.Tensor,
        logits_NV: torch.Tensor | None,
        teacher_SE: torch.Tensor,
        teacher_weight_VE: torch.Tensor,
        kl_weight_S: torch.Tensor,
        temperature: float,
        shard: VocabShard,
        chunk_bytes: int,
    ) -> torch.Tensor:
        heads = (hidden_SD, weight_VD, scored_S, logits_NV, teacher_SE, teacher_weight_VE)
        num_tokens = len(labels_S)
        # Row 0: teacher, row 1: student.
        max_2S = loss_S.new_full((2, num_tokens), -torch.inf)
        # Sum of the teacher's exponentials, of the student's, and of the teacher's times the
        # difference of the two logits.
        sums_3S = loss_S.new_zeros(3, num_tokens)
        for rows in _chunks(num_tokens, shard, chunk_bytes):
            if shard.num_real == 0:  # the shard is all padding
                break
            student_CR, teacher_CR = _both_logits(heads, rows, shard.num_real, temperature)
            for which, z_CR in enumerate((teacher_CR, student_CR)):
                max_2S[which, rows] = z_CR.amax(dim=1)
                z_CR -= max_2S[which, rows, None]
            exp_CR = teacher_CR.exp()
            sums_3S[0, rows] = exp_CR.sum(dim=1)
            sums_3S[2, rows] = exp_CR.mul_(teacher_CR - student_CR).sum(dim=1)
            sums_3S[1, rows] = student_CR.exp_().sum(dim=1)

        if shard.group is not None and shard.group.size() > 1:
            shard_max_2S = max_2S.clone()
            all_reduce_(max_2S, shard.group, dist.ReduceOp.MAX)
            if shard.num_real:
                shift_2S = shard_max_2S - max_2S
                scale_2S = shift_2S.exp()
                sums_3S[2] += (shift_2S[0] - shift_2S[1]) * sums_3S[0]
                sums_3S[2] *= scale_2S[0]
                sums_3S[:2] *= scale_2S
            all_reduce_(sums_3S, shard.group)

        log_2S = sums_3S[:2].log()
        kl_S = sums_3S[2] / sums_3S[0] - log_2S[0] + log_2S[1]
        ctx.save_for_backward(*heads, labels_S, lse_S, log_2S + max_2S, kl_weight_S)
        ctx.temperature, ctx.shard, ctx.chunk_bytes = temperature, shard, chunk_bytes
        return kl_weight_S * kl_S + (1.0 - kl_weight_S) * loss_S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_S,) = grads
        *heads, labels_S, lse_S, tempered_lse_2S, kl_weight_S = ctx.saved_tensors
        hidden_SD, weight_VD = heads[0], heads[1]
        shard: VocabShard = ctx.shard
        temperature: float = ctx.temperature
        num_tokens, real = len(labels_S), shard.num_real
        grad_hidden_SD = torch.empty_like(hidden_SD)
        grad_weight_VD = None
        if ctx.needs_input_grad[1]:  # else the head is frozen
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        local_S, here_S = shard.localise(labels_S)
        # d KL / d z = (softmax(z / temperature) - p_t) / temperature.
        kl_S = kl_weight_S * grad_S / temperature
        label_S = (1.0 - kl_weight_S) * grad_S

        for rows in _chunks(num_tokens, shard, ctx.chunk_bytes):
            student_CR, teacher_CR = _both_logits(heads, rows, real, temperature)
            teacher_CR.sub_(tempered_lse_2S[0, rows, None]).exp_()
            # Zero in the padding columns.
            dz_CV = student_CR.new_zeros(len(student_CR), shard.num_rows)
            dz_CR = dz_CV[:, :real]
            torch.sub(student_CR, tempered_lse_2S[1, rows, None], out=dz_CR).exp_()
            dz_CR.sub_(teacher_CR).mul_(kl_S[rows, None])
            p_CR = student_CR.mul_(temperature).sub_(lse_S[rows, None]).exp_()
            dz_CR += p_CR.mul_(label_S[rows, None])
            dz_CV.scatter_add_(1, local_S[rows, None], -(here_S * label_S)[rows, None])
            dz_CV = dz_CV.to(hidden_SD.dtype)
            torch.mm(dz_CV, weight_VD, out=grad_hidden_SD[rows])
            if grad_weight_VD is None:
                continue
            if weight_VD.dtype == torch.float32:
                grad_weight_VD.addmm_(dz_CV.t(), hidden_SD[rows])
            else:
                grad_weight_VD += dz_CV.t() @ hidden_SD[rows]

        if shard.group is not None and shard.group.size() > 1:
            # Each rank holds the contribution of its own vocabulary rows to the hidden gradient.
            all_reduce_(grad_hidden_SD, shard.group)
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_SD, grad_weight, *(None,) * 11


def _chunks(num_tokens: int, shard: VocabShard, chunk_bytes: int) -> list[slice]:
    step = chunk_rows(2 * shard.num_rows, chunk_bytes)
    return [slice(at, min(at + step, num_tokens)) for at in range(0, num_tokens, step)]


def _both_logits(
    heads: Any, rows: slice, num_real: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits divided by the temperature, float32 [C, R] each."""
    hidden_SD, weight_VD, scored_S, logits_NV, teacher_SE, teacher_weight_VE = heads
    if logits_NV is None:
        student_CV = hidden_SD[rows] @ weight_VD.t()
    else:
        student_CV = logits_NV[rows if scored_S is None else scored_S[rows]]
    teacher_CV = teacher_SE[rows] @ teacher_weight_VE.t()
    # The division allocates new tensors, so kept logits are not modified.
    return (
        student_CV[:, :num_real].float() / temperature,
        teacher_CV[:, :num_real].float() / temperature,
    )
