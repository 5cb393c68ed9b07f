"""Gradients of kept tokens against torch's autograd over full float64 logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.ops.head.cross_entropy import kept_linear_cross_entropy
from megatron_eslm.ops.head.statistics import HeadStatistics, VocabShard, head_statistics

from ..harness import run_ranks
from .plain_head import Case, make_case, observe, plain_head

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(1, 1, 2, 2), (13, 5, 17, 24), (64, 16, 31, 32), (7, 33, 50, 50)]


def kept_of(n: int, which: str) -> torch.Tensor | None:
    """Indices of the kept tokens; None is the form for "all of them"."""
    return {
        "none": torch.empty(0, dtype=torch.int64),
        "some": torch.arange(n)[torch.arange(n) % 3 != 1],
        "all by index": torch.arange(n),
        "all": None,
    }[which]


def upstream(k: int) -> torch.Tensor:
    """Gradients other than one: negative, zero, large."""
    return torch.linspace(-2.0, 3.0, k).round(decimals=1)


def run(
    case: Case,
    kept_K: torch.Tensor | None,
    shard: VocabShard,
    *,
    keep_logits: bool,
    chunk_tokens: int = 10**6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, gradient of all N hidden states, gradient of the weights)."""
    chunk_bytes = 4 * shard.num_rows * chunk_tokens
    statistics = head_statistics(
        case.hidden_ND,
        case.weight_VD,
        case.labels_N,
        shard,
        entropy=False,
        keep_logits=keep_logits,
        chunk_bytes=chunk_bytes,
    )
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    weight_VD = case.weight_VD.clone().requires_grad_()
    loss_K = kept_linear_cross_entropy(
        hidden_ND if kept_K is None else hidden_ND[kept_K],
        weight_VD,
        case.labels_N if kept_K is None else case.labels_N[kept_K],
        kept_K,
        statistics,
        shard,
        chunk_bytes=chunk_bytes,
    )
    loss_K.backward(upstream(len(loss_K)))
    return loss_K.detach(), hidden_ND.grad, weight_VD.grad


def plain(
    case: Case, kept_K: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss_N, _, _, hidden_ND, weight_VD = plain_head(case, gradient=True)
    loss_K = loss_N if kept_K is None else loss_N[kept_K]
    loss_K.backward(upstream(len(loss_K)).double())
    return loss_K.detach(), hidden_ND.grad, weight_VD.grad


def assert_close_in_norm(mine: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    assert mine.shape == other.shape
    difference = (mine.double() - other.double()).norm()
    assert difference <= tolerance * other.double().norm(), (difference, other.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("which", ["none", "some", "all by index", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_autograd(shape: tuple, which: str, keep_logits: bool, dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype=dtype, scale=0.5)
    before = case.clone()
    kept_K = kept_of(shape[0], which)
    shard = VocabShard.of(shape[2], shape[3])
    for chunk_tokens in (1, 5, 1000):
        got = run(case, kept_K, shard, keep_logits=keep_logits, chunk_tokens=chunk_tokens)
        case.assert_equal(before)
        assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
        for mine, other in zip(got, plain(case, kept_K), strict=True):
            assert_close_in_norm(mine, other, TOLERANCE[dtype])
        assert not got[2][case.vocab_size :].any(), "padding rows of the head moved"
        if kept_K is not None:
            dropped_N = torch.ones(shape[0], dtype=torch.bool)
            dropped_N[kept_K] = False
            assert not got[1][dropped_N].any()


def test_a_frozen_head_has_no_gradient_and_the_hidden_states_have_theirs() -> None:
    case, shard = make_case(*SHAPES[1], scale=0.5), VocabShard.of(17, 24)
    statistics = head_statistics(
        case.hidden_ND, case.weight_VD, case.labels_N, shard, entropy=False, keep_logits=False
    )
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    loss_N = kept_linear_cross_entropy(
        hidden_ND, case.weight_VD, case.labels_N, None, statistics, shard
    )
    loss_N.backward(upstream(len(loss_N)))
    assert case.weight_VD.grad is None
    assert torch.equal(hidden_ND.grad, run(case, None, shard, keep_logits=False)[1])


def test_no_tokens_at_all() -> None:
    case = make_case(0, 5, 17, 24)
    for keep_logits in (False, True):
        loss_K, grad_hidden, grad_weight = run(
            case, None, VocabShard.of(17, 24), keep_logits=keep_logits
        )
        assert loss_K.shape == (0,)
        assert grad_hidden.shape == (0, 5)
        assert not grad_weight.any()


@pytest.mark.parametrize("keep_logits", [False, True])
def test_extreme_logits(keep_logits: bool) -> None:
    hidden_ND = torch.tensor([[1e4], [-1e4], [1e4], [-1e4], [0.0]])
    weight_VD = torch.tensor([[1.0], [-1.0], [-1.0], [0.5], [99.0], [99.0]])
    case = Case(hidden_ND, weight_VD, torch.tensor([0, 0, 1, 1, 2]), 4)
    got = run(case, None, VocabShard.of(4, 6), keep_logits=keep_logits)
    # Probabilities are exp(z - logsumexp); at 1e4 a float32 logsumexp is rounded by up to 5e-4.
    for mine, other, tolerance in zip(got, plain(case, None), (1e-6, 1e-3, 1e-3), strict=True):
        assert mine.isfinite().all()
        assert_close_in_norm(mine, other, tolerance)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_backward_changes_nothing_it_was_given(keep_logits: bool) -> None:
    """A second backward pass over the same graph gives the same gradients."""
    case = make_case(13, 5, 17, 24)
    shard = VocabShard.of(17, 24)
    statistics: HeadStatistics = head_statistics(
        case.hidden_ND, case.weight_VD, case.labels_N, shard, entropy=True, keep_logits=keep_logits
    )
    copies = [None if x is None else x.clone() for x in vars(statistics).values()]
    kept_K = kept_of(13, "some")
    hidden_KD = case.hidden_ND[kept_K].requires_grad_()
    weight_VD = case.weight_VD.requires_grad_()
    loss_K = kept_linear_cross_entropy(
        hidden_KD, weight_VD, case.labels_N[kept_K], kept_K, statistics, shard
    )
    gradient_K = upstream(len(loss_K))
    first = torch.autograd.grad(loss_K, (hidden_KD, weight_VD), gradient_K, retain_graph=True)
    second = torch.autograd.grad(loss_K, (hidden_KD, weight_VD), gradient_K)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(gradient_K, upstream(len(loss_K)))
    for copy, now in zip(copies, vars(statistics).values(), strict=True):
        assert (copy is None and now is None) or torch.equal(copy, now)


@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_products_are_those_of_kept_tokens(keep_logits: bool, dtype: torch.dtype) -> None:
    n, d, v = 64, 8, 96
    case = make_case(n, d, 90, v, dtype=dtype)
    kept_K = torch.arange(0, n, 4)
    with observe() as observed:
        run(case, kept_K, VocabShard.of(90, v), keep_logits=keep_logits, chunk_tokens=5)
    once, per_kept_token = n * d * v, 2 if keep_logits else 3
    assert observed.multiply_adds == once + per_kept_token * len(kept_K) * d * v


@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
def test_no_float32_logits_in_bf16(keep_logits: bool) -> None:
    case = make_case(64, 8, 90, 96, dtype=torch.bfloat16)
    with observe() as observed:
        run(case, None, VocabShard.of(90, 96), keep_logits=keep_logits, chunk_tokens=5)
    assert observed.largest_float32 <= 96 * 8  # the weights' gradient; logits are 64 * 96


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_agree_with_one_process(world_size: int) -> None:
    variants = [
        (case, kept_of(len(case.hidden_ND), which), keep_logits)
        for case in (
            make_case(13, 5, 17, 24),  # of four shards the last is all padding
            make_case(13, 5, 9, 24),  # of four two are
            make_case(9, 4, 23, 24, dtype=torch.bfloat16),
        )
        for which in ("none", "some", "all")
        for keep_logits in (False, True)
    ]

    def on_rank(rank: int) -> list[tuple[torch.Tensor, ...]]:
        results = []
        for case, kept_K, keep_logits in variants:
            shard = VocabShard.of(case.vocab_size, len(case.weight_VD), dist.group.WORLD)
            part = case.clone()
            part.weight_VD = case.weight_VD.chunk(world_size)[rank].clone()
            results.append(run(part, kept_K, shard, keep_logits=keep_logits, chunk_tokens=4))
        return results

    ranks = run_ranks(world_size, on_rank)
    for i, (case, kept_K, keep_logits) in enumerate(variants):
        shard = VocabShard.of(case.vocab_size, len(case.weight_VD))
        loss_K, grad_hidden, grad_weight = run(case, kept_K, shard, keep_logits=keep_logits)
        tolerance = TOLERANCE[case.hidden_ND.dtype]
        for rank in ranks:
            assert_close_in_norm(rank[i][0], loss_K, tolerance)
            assert_close_in_norm(rank[i][1], grad_hidden, tolerance)
            assert torch.equal(rank[i][1], ranks[0][i][1])
        assert_close_in_norm(torch.cat([rank[i][2] for rank in ranks]), grad_weight, tolerance)
