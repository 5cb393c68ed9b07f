"""Statistics of the head without any logits in memory: matmul and online softmax in one kernel.

`triton_kernel` writes logits once and reads them once (4 bytes per logit in half precision, against
2 D operations). This kernel keeps a tile of logits in registers. One program multiplies a tile of
tokens with all tiles of one share of the vocabulary and writes four numbers per token and share,
which are merged afterwards. Each token tile has several shares, so a few thousand tokens fill a
GPU; programs of the same share run side by side and read its weights from the cache. At D = 768 on
an H100 the saved traffic takes 1.2 ps per logit and the matmul at least 1.9: the kernel wins if it
reaches more than about 60 % of cuBLAS' speed, at D = 1600 more than 77 %. Therefore `triton` is the
default, and this backend is `--head-kernel triton-fused`; `benchmarks/head_kernel.py` measures
both. Gradients, and statistics with kept logits, come from `triton_kernel`.

Shape legend: N scored tokens, D hidden, V rows of this rank's shard, R shares of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from megatron_eslm.ops.head import triton_kernel
from megatron_eslm.ops.head.triton_kernel import block_limits, softmax_gradient

__all__ = ["block_limits", "partial_statistics", "softmax_gradient"]


class Tile(NamedTuple):
    """Tile sizes of the matmul; powers of two, 16 or more."""

    tokens: int
    columns: int
    hidden: int


TILES = {2: Tile(128, 128, 64), 4: Tile(128, 64, 32)}
"""Tile by bytes per number. Compiled for an A100 and an H100, the tiles fit into shared memory and
do not spill registers."""
NUM_WARPS, NUM_STAGES = 8, 3
PROGRAMS = 1024
"""Minimum number of programs to aim for: several per streaming multiprocessor of a GPU."""


@triton.jit
def _fused_kernel(
    hidden_ptr,
    weight_ptr,
    column_ptr,
    max_ptr,
    sums_ptr,
    hidden_stride,
    weight_stride,
    num_tokens,
    num_hidden,
    num_real,
    share_columns,
    num_shares,
    ENTROPY: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Process one tile of tokens against one share of the vocabulary per program."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    share = tl.program_id(1)
    is_token = token < num_tokens
    column = tl.load(column_ptr + token, mask=is_token, other=-1)
    at_hidden = tl.arange(0, HIDDEN)
    token_ptr = hidden_ptr + token.to(tl.int64)[:, None] * hidden_stride
    top = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    weighted = tl.zeros([TOKENS], tl.float32)
    label = tl.zeros([TOKENS], tl.float32)
    first = share * share_columns
    for start in range(first, tl.minimum(first + share_columns, num_real), COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        real = at < num_real
        row_ptr = weight_ptr + at.to(tl.int64)[None, :] * weight_stride
        z = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for from_hidden in range(0, num_hidden, HIDDEN):
            d = from_hidden + at_hidden
            a = tl.load(
                token_ptr + d[None, :], is_token[:, None] & (d < num_hidden)[None, :], other=0.0
            )
            b = tl.load(row_ptr + d[:, None], real[None, :] & (d < num_hidden)[:, None], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision=PRECISION)
        # Round to the compute dtype, like the logits in memory from which gradients are computed.
        z = z.to(hidden_ptr.dtype.element_ty).to(tl.float32)
        label += tl.sum(tl.where(at[None, :] == column[:, None], z, 0.0), axis=1)
        z = tl.where(real[None, :], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=1))
        # If all logits so far are -inf, a shift by -inf would turn later ones into nan.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fall = tl.where(total == 0.0, 0.0, top - shift)
        scale = tl.exp(fall)
        shifted = tl.where(real[None, :], z - shift[:, None], 0.0)
        exponentials = tl.where(real[None, :], tl.exp(shifted), 0.0)
        if ENTROPY:
            weighted = scale * (weighted + fall * total) + tl.sum(exponentials * shifted, axis=1)
        total = scale * total + tl.sum(exponentials, axis=1)
        top = higher
    out = share * num_tokens + token
    plane = num_shares * num_tokens
    tl.store(max_ptr + out, top, mask=is_token)
    tl.store(sums_ptr + out, total, mask=is_token)
    tl.store(sums_ptr + plane + out, weighted, mask=is_token)
    tl.store(sums_ptr + 2 * plane + out, label, mask=is_token)


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
    if logits_NV is not None or not num_tokens:
        return triton_kernel.partial_statistics(
            hidden_ND,
            weight_VD,
            column_N,
            num_real,
            logits_NV,
            entropy=entropy,
            chunk_bytes=chunk_bytes,
        )
    assert hidden_ND.stride(1) == weight_VD.stride(1) == 1
    tile = TILES[hidden_ND.element_size()]
    token_tiles = triton.cdiv(num_tokens, tile.tokens)
    column_tiles = triton.cdiv(num_real, tile.columns)
    shares = min(column_tiles, triton.cdiv(PROGRAMS, token_tiles))
    share_columns = triton.cdiv(column_tiles, shares) * tile.columns
    shares = triton.cdiv(num_real, share_columns)
    max_RN = hidden_ND.new_empty(shares, num_tokens, dtype=torch.float32)
    sums_3RN = hidden_ND.new_empty(3, shares, num_tokens, dtype=torch.float32)
    _fused_kernel[(token_tiles, shares)](
        hidden_ND,
        weight_VD,
        column_N,
        max_RN,
        sums_3RN,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        num_tokens,
        hidden_ND.shape[1],
        num_real,
        share_columns,
        shares,
        ENTROPY=entropy,
        TOKENS=tile.tokens,
        COLUMNS=tile.columns,
        HIDDEN=tile.hidden,
        # Same precision as torch's matmuls; by default Triton rounds float32 to TF32.
        PRECISION="ieee" if hidden_ND.dtype == torch.float32 else "tf32",
        # Triton's interpreter multiplies the bits of bfloat16 as integers.
        WIDEN=hidden_ND.device.type == "cpu",
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return _together(max_RN, sums_3RN)


def _together(max_RN: torch.Tensor, sums_3RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the statistics of all shares."""
    total_RN, weighted_RN, label_RN = sums_3RN
    max_N = max_RN.amax(dim=0)
    # A share whose logits are all -inf adds nothing; -inf times 0 would be nan.
    fall_RN = (max_RN - max_N).masked_fill(total_RN == 0, 0.0)
    scale_RN = fall_RN.exp()
    weighted_RN = scale_RN * (weighted_RN + fall_RN * total_RN)
    sums_3RN = torch.stack([scale_RN * total_RN, weighted_RN, label_RN])
    return max_N, sums_3RN.sum(dim=1)
