"""MLP of the last block, with a backward pass over the tokens in the loss only.

The output of the last block's MLP for a token reaches the loss only through that token's logits.
If tokens are selected by their logits, the forward pass needs all tokens, but the gradients of
dropped tokens are zero. The four backward products skip those rows. The result is exact; only the
order of float32 sums differs.

Shape legend: N tokens, S of them in the loss, D hidden, F the MLP's columns on this rank, W the
first projection's (F, or 2 F for gated activations).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_eslm.ops.activations import Activation
from megatron_eslm.parallel.collectives import all_reduce_


@dataclass
class LossTokenIndex:
    """Indices of a micro-batch's tokens in the loss; filled in after the forward pass."""

    chosen_S: torch.Tensor | None = None
    """int64 [S], indices into the last block's N tokens in (position, row) order; None: all."""


# The selection is not known at trace time; a compiler would treat "all" as a constant.
@torch.compiler.disable
def kept_tokens_mlp(
    x_ND: torch.Tensor,
    up_weight_WD: torch.Tensor,
    up_bias_W: torch.Tensor | None,
    down_weight_DF: torch.Tensor,
    activation: Activation,
    tokens: LossTokenIndex,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Two matmuls with an activation between them, without the second bias.

    Args:
        x_ND: [N, D], the same on every rank of the group.
        up_weight_WD: [W, D], this rank's rows.
        up_bias_W: [W], if there is one.
        down_weight_DF: [D, F], this rank's columns.
        activation: [N, W] -> [N, F].
        tokens: read in the backward pass. Output gradients of other tokens are ignored and must be
            zero.
        group: tensor-parallel ranks over which the columns are sharded.

    Returns:
        [N, D], summed over the group. Gradients equal those of a plain MLP.
    """
    return _KeptTokensMLP.apply(
        x_ND, up_weight_WD, up_bias_W, down_weight_DF, activation, tokens, group
    )


class _KeptTokensMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        up_weight_WD: torch.Tensor,
        up_bias_W: torch.Tensor | None,
        down_weight_DF: torch.Tensor,
        activation: Activation,
        tokens: LossTokenIndex,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        # Add the bias after the matmul, as the regular layers do, so that selection sees identical
        # values.
        wide_NW = x_ND @ up_weight_WD.t()
        if up_bias_W is not None:
            wide_NW.add_(up_bias_W)
        active_NF = activation.apply(wide_NW)
        out_ND = active_NF @ down_weight_DF.t()
        if group is not None and group.size() > 1:
            all_reduce_(out_ND, group)
        ctx.save_for_backward(x_ND, up_weight_WD, down_weight_DF, wide_NW, active_NF)
        ctx.activation, ctx.tokens, ctx.group = activation, tokens, group
        ctx.has_bias = up_bias_W is not None
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_ND,) = grads
        x_ND, up_weight_WD, down_weight_DF, wide_NW, active_NF = ctx.saved_tensors
        chosen_S: torch.Tensor | None = ctx.tokens.chosen_S

        def of_chosen(full: torch.Tensor) -> torch.Tensor:
            return full if chosen_S is None else full.index_select(0, chosen_S)

        grad_SD = of_chosen(grad_ND)
        grad_down_DF = grad_SD.t() @ of_chosen(active_NF)
        grad_wide_SW = ctx.activation.backward(grad_SD @ down_weight_DF, of_chosen(wide_NW))
        grad_up_WD = grad_wide_SW.t() @ of_chosen(x_ND)
        grad_x_SD = grad_wide_SW @ up_weight_WD
        if ctx.group is not None and ctx.group.size() > 1:
            all_reduce_(grad_x_SD, ctx.group)
        grad_x_ND = grad_x_SD
        if chosen_S is not None:
            grad_x_ND = torch.zeros_like(x_ND).index_copy_(0, chosen_S, grad_x_SD)
        grad_bias_W = grad_wide_SW.sum(dim=0) if ctx.has_bias else None
        return grad_x_ND, grad_up_WD, grad_bias_W, grad_down_DF, None, None, None
