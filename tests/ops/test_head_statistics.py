"""Loss and entropy of a vocabulary-parallel head against full float64 logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.ops.head.statistics import (
    HeadStatistics,
    VocabShard,
    chunk_rows,
    head_statistics,
)

from ..harness import run_ranks
from .plain_head import Case, make_case, observe, plain_head

SHAPES = [  # tokens, hidden, vocabulary, padded vocabulary
    (1, 1, 1, 1),
    (1, 3, 2, 2),
    (13, 5, 17, 24),
    (64, 16, 31, 32),
    (7, 33, 50, 50),
]
TOLERANCE = {  # of losses of about ln V, whose logits are rounded to the compute type
    torch.float32: 2e-5,
    torch.bfloat16: 0.1,
    torch.float16: 0.01,
}


def statistics(case: Case, chunk_tokens: int = 10**6, **options) -> HeadStatistics:
    padded = len(case.weight_VD)
    return head_statistics(
        case.hidden_ND,
        case.weight_VD,
        case.labels_N,
        VocabShard.of(case.vocab_size, padded),
        chunk_bytes=4 * padded * chunk_tokens,
        **{"entropy": True, **options},
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_full_logits(shape: tuple, chunk_tokens: int, dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype=dtype, scale=0.5)
    before = case.clone()
    loss_N, entropy_N, lse_N, *_ = plain_head(case)
    for keep_logits in (False, True):
        got = statistics(case, chunk_tokens, keep_logits=keep_logits)
        case.assert_equal(before)
        for mine, plain in (
            (got.loss_N, loss_N),
            (got.entropy_N, entropy_N),
            (got.log_sum_exp_N, lse_N),
        ):
            assert mine.dtype == torch.float32
            assert not mine.requires_grad
            torch.testing.assert_close(
                mine.double(), plain, rtol=TOLERANCE[dtype] / 10, atol=TOLERANCE[dtype]
            )
        if keep_logits:
            assert got.logits_NV.dtype == dtype
            assert got.logits_NV.shape == (shape[0], shape[3])
        else:
            assert got.logits_NV is None


def test_the_statistics_are_those_of_the_rounded_logits_and_no_worse() -> None:
    """In bf16 the only loss of precision is that of the logits themselves."""
    case = make_case(33, 16, 60, 64, dtype=torch.bfloat16)
    got = statistics(case, 4, keep_logits=True)
    log_p_NV = got.logits_NV[:, :60].double().log_softmax(dim=1)
    loss_N = -log_p_NV.gather(1, case.labels_N[:, None]).squeeze(1)
    torch.testing.assert_close(got.loss_N.double(), loss_N, rtol=1e-5, atol=1e-5)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=1)
    torch.testing.assert_close(got.entropy_N.double(), entropy_N, rtol=1e-5, atol=1e-5)


def test_entropy_only_on_request_and_without_effect_on_the_loss() -> None:
    case = make_case(13, 5, 17, 24)
    without, with_entropy = statistics(case, entropy=False), statistics(case, entropy=True)
    assert without.entropy_N is None
    assert torch.equal(without.loss_N, with_entropy.loss_N)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_no_tokens(keep_logits: bool) -> None:
    got = statistics(make_case(0, 5, 17, 24), keep_logits=keep_logits)
    assert got.loss_N.shape == got.entropy_N.shape == got.log_sum_exp_N.shape == (0,)


def extreme_case() -> Case:
    """Logits of +-1e4: the label far ahead, far behind, and all equal."""
    hidden_ND = torch.tensor([[1e4], [-1e4], [1e4], [-1e4], [0.0]])
    weight_VD = torch.tensor([[1.0], [-1.0], [-1.0], [0.5], [99.0], [99.0]])
    return Case(hidden_ND, weight_VD, torch.tensor([0, 0, 1, 1, 2]), 4)


def test_extreme_logits() -> None:
    case = extreme_case()
    loss_N, entropy_N, *_ = plain_head(case)
    got = statistics(case, keep_logits=True)
    assert got.loss_N.isfinite().all()
    torch.testing.assert_close(got.loss_N.double(), loss_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy_N.double(), entropy_N, rtol=1e-6, atol=1e-6)
    assert got.loss_N[0] == 0.0
    assert got.loss_N[1] == pytest.approx(2e4 + math.log(2))  # two tokens share the probability
    assert got.entropy_N[4] == pytest.approx(math.log(4))


def test_an_entropy_is_never_below_zero_by_more_than_rounding() -> None:
    got = statistics(make_case(200, 8, 40, 40, scale=20.0))
    assert got.entropy_N.min() > -1e-5


def test_nan_stays_with_its_token() -> None:
    case = make_case(6, 5, 17, 24)
    case.hidden_ND[2, 1] = torch.nan
    got = statistics(case)
    for values_N in (got.loss_N, got.entropy_N):
        assert values_N.isnan().tolist() == [i == 2 for i in range(6)]


@pytest.mark.parametrize("keep_logits", [False, True])
def test_no_float32_logits_in_bf16(keep_logits: bool) -> None:
    case = make_case(64, 8, 90, 96, dtype=torch.bfloat16)
    with observe() as observed:
        statistics(case, chunk_tokens=5, keep_logits=keep_logits)
    assert observed.largest_float32 <= 5 * 96  # of 64 * 96
    assert observed.multiply_adds == 64 * 8 * 96


def test_chunks() -> None:
    assert chunk_rows(50304) == 667
    assert chunk_rows(10**9) == 1


def test_shards_cover_the_vocabulary() -> None:
    shard = VocabShard.of(17, 24)
    assert (shard.start, shard.num_rows, shard.num_real) == (0, 24, 17)
    ranks = run_ranks(4, lambda rank: as_numbers(VocabShard.of(17, 24, dist.group.WORLD)))
    assert ranks == [(0, 6, 6), (6, 6, 6), (12, 6, 5), (18, 6, 0)]


def as_numbers(shard: VocabShard) -> tuple[int, int, int]:
    return shard.start, shard.num_rows, shard.num_real


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_agree_with_one_process(world_size: int) -> None:
    cases = [
        make_case(13, 5, 17, 24),  # of four shards the last is all padding
        make_case(13, 5, 9, 24),  # of four two are, of two one is in part
        make_case(9, 4, 23, 24, dtype=torch.bfloat16),
        make_case(0, 4, 23, 24),
        _with_padding(extreme_case()),
    ]

    def on_rank(rank: int) -> list[tuple[torch.Tensor, ...]]:
        results = []
        for case in cases:
            got = head_statistics(
                case.hidden_ND,
                case.weight_VD.chunk(world_size)[rank],
                case.labels_N,
                VocabShard.of(case.vocab_size, len(case.weight_VD), dist.group.WORLD),
                entropy=True,
                keep_logits=True,
                chunk_bytes=100,
            )
            results.append((got.loss_N, got.entropy_N, got.log_sum_exp_N, got.logits_NV))
        return results

    ranks = run_ranks(world_size, on_rank)
    for i, case in enumerate(cases):
        alone = statistics(case, keep_logits=True)
        for rank in ranks:
            one = (alone.loss_N, alone.entropy_N, alone.log_sum_exp_N)
            for mine, other, first in zip(rank[i][:3], one, ranks[0][i][:3], strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
                assert torch.equal(mine, first)
        torch.testing.assert_close(torch.cat([r[i][3] for r in ranks], dim=1), alone.logits_NV)


def _with_padding(case: Case) -> Case:
    weight_VD = torch.cat([case.weight_VD, torch.full((2, 1), 99.0)])
    return Case(case.hidden_ND, weight_VD, case.labels_N, case.vocab_size)


def test_nan_in_one_shard_reaches_all() -> None:
    case = make_case(5, 3, 8, 8)
    case.weight_VD[6] = torch.nan  # in the second of two shards

    def on_rank(rank: int) -> torch.Tensor:
        shard = VocabShard.of(8, 8, dist.group.WORLD)
        weight_VD = case.weight_VD.chunk(2)[rank]
        return head_statistics(case.hidden_ND, weight_VD, case.labels_N, shard, entropy=True).loss_N

    assert all(loss_N.isnan().all() for loss_N in run_ranks(2, on_rank))
