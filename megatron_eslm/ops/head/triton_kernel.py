"""The head on a CUDA device: cuBLAS matmuls, and one Triton pass over the resulting logits.

Cost for N scored and K kept tokens and L bytes per logit (2 in half precision):

- Statistics: one matmul (2 N V D operations). Logits are written once and read once, 2 L N V
  bytes; PyTorch operations move about 40 N V bytes (float32 copy, maximum, difference, exponential
  and sums, one pass each).
- Gradient: three matmuls over kept tokens (2 K V D operations each: recomputed logits, hidden
  states, weights), or two with kept logits. The gradient at the logits overwrites recomputed
  logits. Traffic is 5 L K V bytes including the matmuls' reads and writes, 4 L K V with kept
  logits, which the kernel reads by index.

Two fully fused kernels (over token tiles for the hidden states, over vocabulary tiles for the
weights) would write no logits, but each would recompute them: four matmuls. On an H100 (at most
800 TFLOP/s, 3.35 TB/s) the fourth matmul takes 1.9 ps per logit at D = 768 and 4.0 at D = 1600, and
the traffic that it saves takes 3.0. That breaks even only if our kernels match cuBLAS in all four,
which they do not. No backend uses atomic operations: the same input gives the same bits.

Blocks are bounded by a byte budget; nothing of size [N, V] exists except kept logits.

Shape legend: N scored tokens, K kept tokens, D hidden, V rows of this rank's shard, W columns of a
block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_eslm.ops.head.contract import BlockLimits, GradientBlock, slices

COLUMNS = 4096
"""Columns of a row that one program reads at a time, a power of two: 16 per thread."""
NUM_WARPS = 8


@triton.jit
def _statistics_kernel(
    logits_ptr,
    column_ptr,
    max_ptr,
    sums_ptr,
    stride,
    sums_stride,
    num_real,
    ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute maximum, sums of exponentials and label's logit of one row per program."""
    row = tl.program_id(0)
    # 64 bits: kept logits may have more than 2^31 elements.
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    weighted = tl.full([], 0.0, tl.float32)
    for start in range(0, num_real, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        real = at < num_real
        z = tl.load(row_ptr + at, mask=real, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, axis=0))
        # If all logits so far are -inf, a shift by -inf would turn later ones into nan.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fall = tl.where(total == 0.0, 0.0, top - shift)
        scale = tl.exp(fall)
        shifted = tl.where(real, z - shift, 0.0)
        exponentials = tl.where(real, tl.exp(shifted), 0.0)
        if ENTROPY:
            weighted = scale * (weighted + fall * total) + tl.sum(exponentials * shifted, axis=0)
        total = scale * total + tl.sum(exponentials, axis=0)
        top = higher
    column = tl.load(column_ptr + row)
    label = tl.load(row_ptr + column, mask=column >= 0, other=0.0).to(tl.float32)
    tl.store(max_ptr + row, top)
    tl.store(sums_ptr + row, total)
    tl.store(sums_ptr + sums_stride + row, weighted)
    tl.store(sums_ptr + 2 * sums_stride + row, label)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    kept_ptr,
    lse_ptr,
    column_ptr,
    grad_ptr,
    out_ptr,
    stride,
    out_stride,
    num_columns,
    num_real,
    INDEXED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute (softmax - onehot) grad of COLUMNS logits of one row; `out` may alias `logits`."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(kept_ptr + row) if INDEXED else row
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = at < num_real
    z = tl.load(logits_ptr + source * stride + at, mask=real, other=0.0).to(tl.float32)
    p = tl.exp(z - tl.load(lse_ptr + row))
    dz = tl.where(at == tl.load(column_ptr + row), p - 1.0, p) * tl.load(grad_ptr + row)
    dz = tl.where(real, dz, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + at, dz, mask=at < num_columns)


def statistics_of_logits(
    logits_CV: torch.Tensor,
    column_C: torch.Tensor,
    num_real: int,
    max_C: torch.Tensor,
    sums_3C: torch.Tensor,
    *,
    entropy: bool,
) -> None:
    """Fill max_C and sums_3C (see HeadBackend.partial_statistics) from one read of the logits."""
    assert logits_CV.stride(1) == sums_3C.stride(1) == max_C.stride(0) == 1
    if not len(logits_CV):  # a launch grid must not be empty
        return
    _statistics_kernel[(len(logits_CV),)](
        logits_CV,
        column_C,
        max_C,
        sums_3C,
        logits_CV.stride(0),
        sums_3C.stride(0),
        num_real,
        ENTROPY=entropy,
        COLUMNS=COLUMNS,
        num_warps=NUM_WARPS,
    )


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
    num_tokens = len(hidden_ND)
    max_N = hidden_ND.new_empty(num_tokens, dtype=torch.float32)
    sums_3N = hidden_ND.new_empty(3, num_tokens, dtype=torch.float32)
    if logits_NV is not None:
        torch.mm(hidden_ND, weight_VD.t(), out=logits_NV)
        statistics_of_logits(logits_NV, column_N, num_real, max_N, sums_3N, entropy=entropy)
        return max_N, sums_3N
    step = max(1, chunk_bytes // (hidden_ND.element_size() * len(weight_VD)))
    buffer_CV = hidden_ND.new_empty(min(step, num_tokens), len(weight_VD))
    for rows in slices(num_tokens, step):
        logits_CV = buffer_CV[: rows.stop - rows.start]
        torch.mm(hidden_ND[rows], weight_VD.t(), out=logits_CV)
        statistics_of_logits(
            logits_CV, column_N[rows], num_real, max_N[rows], sums_3N[:, rows], entropy=entropy
        )
    return max_N, sums_3N


def softmax_gradient(block: GradientBlock, out_KW: torch.Tensor) -> None:
    """See HeadBackend. Overwrites recomputed logits, or reads kept ones in one pass."""
    num_kept, width = out_KW.shape
    if not num_kept:
        return
    logits = block.logits_NW
    if logits is None:
        logits = torch.mm(block.hidden_KD, block.weight_WD.t(), out=out_KW)
    assert logits.stride(1) == out_KW.stride(1) == 1
    _gradient_kernel[(num_kept, triton.cdiv(width, COLUMNS))](
        logits,
        block.kept_K,
        block.lse_K,
        block.column_K,
        # Upstream gradients may be an expanded scalar.
        block.grad_K.contiguous(),
        out_KW,
        logits.stride(0),
        out_KW.stride(0),
        width,
        block.num_real,
        INDEXED=block.logits_NW is not None and block.kept_K is not None,
        COLUMNS=COLUMNS,
        num_warps=NUM_WARPS,
    )


def block_limits(hidden_KD: torch.Tensor, chunk_bytes: int) -> BlockLimits:
    """See HeadBackend."""
    return BlockLimits(max(1, chunk_bytes // hidden_KD.element_size()), 2**31)
