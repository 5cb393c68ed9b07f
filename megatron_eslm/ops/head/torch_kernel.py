"""The head in PyTorch: online softmax statistics over tiles of tokens and vocabulary.

On a CPU a tile stays in the cache from its matmul to its last sum, and all tiles reuse the same
buffers, so only weights and hidden states are read from memory. With blocks of full rows, moving
logits took a fifth (float32) to a third (bf16) of the head's time. On a GPU, where every operation
is a kernel launch, a tile is as many full rows as the byte budget allows.

Shape legend: N scored tokens, K kept tokens, D hidden, V rows of this rank's shard, W columns of a
block; C tokens and T columns of a tile, R of them real.
"""

from __future__ import annotations

import torch

from megatron_eslm.ops.head.contract import BlockLimits, GradientBlock, slices

CPU_TILE = (512, 4096)
"""Tokens and columns of a tile on a CPU: 8 MiB in float32."""


def tile_shape(num_columns: int, chunk_bytes: int, device: torch.device) -> tuple[int, int]:
    """Tokens and columns of a tile with at most `chunk_bytes` of float32 logits."""
    most = max(1, chunk_bytes // 4)
    if device.type == "cpu":
        columns = min(num_columns, CPU_TILE[1], most)
        return min(CPU_TILE[0], most // columns), columns
    columns = min(num_columns, most)
    return most // columns, columns


def partial_statistics(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    column_N: torch.Tensor,
    num_real: int,
    logits_NV: torch.Tensor | None,
    *,
    entropy: bool,
    chunk_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See HeadBackend."""
    num_tokens, num_rows = len(hidden_ND), len(weight_VD)
    max_N = hidden_ND.new_full((num_tokens,), -torch.inf, dtype=torch.float32)
    sums_3N = hidden_ND.new_zeros(3, num_tokens, dtype=torch.float32)
    tile = tile_shape(num_rows, chunk_bytes, hidden_ND.device)
    tile_numel = min(tile[0], num_tokens) * tile[1]
    z_buffer = hidden_ND.new_empty(tile_numel, dtype=torch.float32)
    separate = hidden_ND.dtype != torch.float32 and logits_NV is None
    logits_buffer = hidden_ND.new_empty(tile_numel) if separate else z_buffer

    for rows in slices(num_tokens, tile[0]):
        hidden_CD, column_C = hidden_ND[rows], column_N[rows]
        for columns in slices(num_rows, tile[1]):
            if logits_NV is None:
                if columns.start >= num_real:
                    break
                shape = (len(hidden_CD), columns.stop - columns.start)
                logits_CT = logits_buffer[: shape[0] * shape[1]].view(shape)
            else:
                logits_CT = logits_NV[rows, columns]
            torch.mm(hidden_CD, weight_VD[columns].t(), out=logits_CT)
            real = min(columns.stop, num_real) - columns.start
            if real <= 0:  # padding: its logits are kept but not counted
                continue
            logits_CR = logits_CT[:, :real]
            z_CR = logits_CR
            if separate or logits_NV is not None:
                z_CR = z_buffer[: len(hidden_CD) * real].view(-1, real)
            if logits_CR.dtype != torch.float32:
                logits_CR = z_CR.copy_(logits_CR)
            column_in_tile_C = column_C - columns.start
            label_C = logits_CR.gather(1, column_in_tile_C.clamp(0, real - 1)[:, None]).squeeze(1)
            is_here_C = (column_in_tile_C >= 0) & (column_in_tile_C < real)
            sums_3N[2, rows] = torch.where(is_here_C, label_C, sums_3N[2, rows])
            _add_tile(logits_CR, z_CR, max_N[rows], sums_3N[:, rows], entropy)
    return max_N, sums_3N


def _add_tile(
    logits_CR: torch.Tensor,
    z_CR: torch.Tensor,
    max_C: torch.Tensor,
    sums_3C: torch.Tensor,
    entropy: bool,
) -> None:
    """Online softmax: accumulate a tile of float32 logits into maximum and sums.

    Overwrites z_CR, which may be the same memory as logits_CR.
    """
    higher_C = torch.maximum(max_C, logits_CR.amax(dim=1))
    # If all logits so far are -inf, a shift by -inf would turn later ones into nan.
    shift_C = higher_C.masked_fill(higher_C == -torch.inf, 0.0)
    fall_C = (max_C - shift_C).masked_fill(sums_3C[0] == 0, 0.0)
    scale_C = fall_C.exp()
    torch.sub(logits_CR, shift_C[:, None], out=z_CR)
    if entropy:
        exp_CR = z_CR.exp()
        carried_C = sums_3C[1] + fall_C * sums_3C[0]
        sums_3C[1] = scale_C * carried_C + z_CR.mul_(exp_CR).sum(dim=1)
    else:
        exp_CR = z_CR.exp_()
    sums_3C[0] = scale_C * sums_3C[0] + exp_CR.sum(dim=1)
    max_C.copy_(higher_C)


def softmax_gradient(block: GradientBlock, out_KW: torch.Tensor) -> None:
    """See HeadBackend."""
    num_kept, width = out_KW.shape
    real, dtype = block.num_real, out_KW.dtype
    step = CPU_TILE[0] if out_KW.device.type == "cpu" else max(1, num_kept)
    z_buffer = None
    if dtype != torch.float32:
        z_buffer = out_KW.new_empty(min(step, num_kept) * width, dtype=torch.float32)
    for rows in slices(num_kept, step):
        out_CW = logits_CW = out_KW[rows]
        if block.logits_NW is None:
            torch.mm(block.hidden_KD[rows], block.weight_WD.t(), out=out_CW)
        elif block.kept_K is None:
            logits_CW = block.logits_NW[rows]
        else:
            torch.index_select(block.logits_NW, 0, block.kept_K[rows], out=out_CW)
        z_CW = out_CW
        if z_buffer is not None:
            logits_CW = z_CW = z_buffer[: out_CW.numel()].view(out_CW.shape).copy_(logits_CW)
        # d loss / d z = softmax(z) - onehot(label), zero in the padding columns.
        torch.sub(logits_CW, block.lse_K[rows, None], out=z_CW).exp_()
        column_C = block.column_K[rows]
        is_here_C = (column_C >= 0) & (column_C < real)
        z_CW.scatter_add_(1, column_C.clamp(0, width - 1)[:, None], -is_here_C[:, None].float())
        z_CW.mul_(block.grad_K[rows, None])
        z_CW[:, real:] = 0.0
        if z_buffer is not None:
            out_CW.copy_(z_CW)


def block_limits(hidden_KD: torch.Tensor, chunk_bytes: int) -> BlockLimits:
    """See HeadBackend."""
    num_columns = CPU_TILE[1] if hidden_KD.device.type == "cpu" else 2**31
    return BlockLimits(max(1, chunk_bytes // 4), num_columns)
