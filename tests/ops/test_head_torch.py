"""Tiles of the PyTorch form: the results do not depend on them."""

from __future__ import annotations

import pytest
import torch

from megatron_eslm.ops.head import cross_entropy as gradients
from megatron_eslm.ops.head import torch_kernel
from megatron_eslm.ops.head.contract import BlockLimits
from megatron_eslm.ops.head.cross_entropy import block_shape
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics

from .plain_head import make_case, plain_head
from .test_head_statistics import TOLERANCE as LOSS_TOLERANCE
from .test_head_statistics import statistics
from .test_kept_linear_cross_entropy import (
    TOLERANCE,
    assert_close_in_norm,
    kept_of,
    plain,
    run,
)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("tile", [(1, 1), (4, 7), (5, 32), (100, 1000)], ids=str)
def test_tiles(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], keep_logits: bool, dtype: torch.dtype
) -> None:
    """Tiles that end in mid-vocabulary, at its end and in its padding."""
    monkeypatch.setattr(torch_kernel, "CPU_TILE", tile)
    for least in (1, 8):
        monkeypatch.setattr(gradients, "LEAST_COLUMNS", least)
        for shape in ((13, 5, 17, 48), (33, 6, 46, 48)):
            case = make_case(*shape, dtype=dtype, scale=0.5)
            loss_N, entropy_N, *_ = plain_head(case)
            got = statistics(case, 6, keep_logits=keep_logits)
            tolerance = LOSS_TOLERANCE[dtype]
            for mine, other in ((got.loss_N, loss_N), (got.entropy_N, entropy_N)):
                torch.testing.assert_close(
                    mine.double(), other, rtol=tolerance / 10, atol=tolerance
                )
            if keep_logits:
                logits_NV = case.hidden_ND.double() @ case.weight_VD.double().t()
                assert_close_in_norm(got.logits_NV, logits_NV, TOLERANCE[dtype])
            shard = VocabShard.of(shape[2], shape[3])
            for which in ("some", "all"):
                kept_K = kept_of(shape[0], which)
                results = run(case, kept_K, shard, keep_logits=keep_logits, chunk_tokens=6)
                for mine, other in zip(results, plain(case, kept_K), strict=True):
                    assert_close_in_norm(mine, other, TOLERANCE[dtype])
                assert not results[2][shape[2] :].any(), "padding rows of the head moved"


def test_a_tile_of_nothing_but_minus_infinity_is_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As float16 logits may overflow to; the first two tiles are such."""
    monkeypatch.setattr(torch_kernel, "CPU_TILE", (2, 10))
    weight_VD = torch.cat([torch.full((20, 2), -torch.inf), torch.randn(25, 2)])
    hidden_ND = torch.rand(3, 2) + 0.1
    labels_N = torch.tensor([30, 44, 20])
    got = head_statistics(hidden_ND, weight_VD, labels_N, VocabShard.of(45, 45), entropy=False)
    torch.testing.assert_close(got.log_sum_exp_N, (hidden_ND @ weight_VD.t()).logsumexp(dim=1))
    assert got.loss_N.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen_whichever_tile_it_is_in(
    monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    monkeypatch.setattr(torch_kernel, "CPU_TILE", (2, 10))
    for row in (0, 15, 44):
        case = make_case(5, 3, 45, 48)
        case.weight_VD[row, 1] = bad
        case.hidden_ND[:, 1] = 0.0  # 0 x inf
        got = statistics(case)
        assert got.loss_N.isnan().all()
        assert got.entropy_N.isnan().all()


def test_blocks_hold_all_tokens_while_they_can() -> None:
    tokens_of = {
        2_000: (2_000, 16_768),  # the whole budget of 2^25, in columns a multiple of 128
        10_000: (10_000, 3_328),
        16_384: (16_384, 2_048),
        50_000: (16_384, 2_048),  # then tokens are divided
    }
    for tokens, shape in tokens_of.items():
        assert block_shape(tokens, 50_304, BlockLimits(2**25, 2**31)) == shape
    assert block_shape(2_000, 50_304, BlockLimits(2**25, 4_096)) == (2_000, 4_096)
    assert block_shape(13, 48, BlockLimits(100, 4_096)) == (2, 48)
    assert block_shape(13, 48, BlockLimits(10, 4_096)) == (1, 10)
