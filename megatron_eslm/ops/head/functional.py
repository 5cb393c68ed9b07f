"""The selective head as one call, for a training loop of one's own.

Shape legend: N tokens, K kept tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_eslm.ops.head.contract import HeadKernel
from megatron_eslm.ops.head.cross_entropy import kept_linear_cross_entropy
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics
from megatron_eslm.ops.keep_rule import EXCLUDED, keep_riskiest

SCORES = ("loss", "entropy")


def selective_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    alpha: float = 0.1,
    score: str = "loss",
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    keep_logits: bool = False,
    kernel: HeadKernel = "auto",
) -> torch.Tensor:
    """Mean cross-entropy of `hidden @ weight.T` over the riskiest 1 - alpha of the tokens.

    The logits are never whole in memory unless `keep_logits` asks for it, and the backward pass
    computes gradients for kept tokens only.

    Args:
        hidden: [N, D], what the head is applied to.
        weight: [V, D], of the same type.
        labels: int64 [N], token ids, or `ignore_index`: such tokens take no part.
        alpha: share of the tokens to drop, in [0, 1); 0 is plain cross-entropy.
        score: risk of a token: its "loss" (CVaR) or the "entropy" of its prediction (VaR).
        ignore_index: the label of tokens without one.
        group: data-parallel ranks whose tokens are thresholded together, with N tokens each. Each
            rank then gets its share of the mean: the shares, and the gradients, add up to those of
            all tokens on one rank. DistributedDataParallel averages gradients, so multiply the loss
            by the number of ranks there.
        keep_logits: keep [N, V] logits, in the type of `hidden`, instead of computing those of kept
            tokens again.
        kernel: "auto" (Triton on CUDA where it is installed), "torch", "triton", "triton-fused".

    Returns:
        float32 scalar, in nats, differentiable in `hidden` and `weight`. 0 where no token has
        a label.

    Raises:
        ValueError: shapes, types or values that do not fit together.
    """
    _check(hidden, weight, labels, alpha, score)
    vocab_size = len(weight)
    valid_N = labels != ignore_index
    if bool((valid_N & ((labels < 0) | (labels >= vocab_size))).any()):
        raise ValueError(
            f"labels lie outside of the {vocab_size} rows of weight, and are not {ignore_index}"
        )
    labels_N = torch.where(valid_N, labels, 0)
    shard = VocabShard.of(vocab_size, vocab_size, kernel=kernel)
    statistics = head_statistics(
        hidden,
        weight,
        labels_N,
        shard,
        entropy=score == "entropy",
        keep_logits=keep_logits,
    )
    risk_N = statistics.entropy_N if score == "entropy" else statistics.loss_N
    assert risk_N is not None
    kept = keep_riskiest(torch.where(valid_N, risk_N, EXCLUDED), alpha, group)
    kept_K = kept.keep.nonzero().squeeze(1)
    loss_K = kept_linear_cross_entropy(
        hidden[kept_K], weight, labels_N[kept_K], kept_K, statistics, shard
    )
    return loss_K.sum() / max(1, kept.num_kept)


def _check(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    alpha: float,
    score: str,
) -> None:
    shapes = f"hidden {[*hidden_ND.shape]}, weight {[*weight_VD.shape]}, labels {[*labels_N.shape]}"
    fits = (
        (hidden_ND.dim(), weight_VD.dim(), labels_N.dim()) == (2, 2, 1)
        and hidden_ND.shape[1] == weight_VD.shape[1]
        and len(hidden_ND) == len(labels_N)
    )
    if not fits:
        raise ValueError(f"{shapes} do not fit together: they are [N, D], [V, D] and [N]")
    if hidden_ND.dtype != weight_VD.dtype or not hidden_ND.is_floating_point():
        raise ValueError(
            f"hidden is {hidden_ND.dtype} and weight {weight_VD.dtype}; cast them to one "
            "floating-point type"
        )
    if labels_N.dtype != torch.int64:
        raise ValueError(f"labels are {labels_N.dtype}, not torch.int64")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha {alpha} is outside [0, 1): it is the share of tokens to drop")
    if score not in SCORES:
        raise ValueError(f"score {score!r} is not one of {', '.join(SCORES)}")
