"""Distillation losses and gradients against torch's autograd over full float64 logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_eslm.ops.head.cross_entropy import kept_linear_cross_entropy
from megatron_eslm.ops.head.distillation import selective_distillation
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics

from ..harness import run_ranks
from .plain_head import Case, make_case, observe
from .test_kept_linear_cross_entropy import (
    SHAPES,
    TOLERANCE,
    assert_close_in_norm,
    kept_of,
    upstream,
)

WIDTH = 7
"""Of the teacher."""


@dataclass
class Lesson:
    """A head, its teacher, and how much of the teacher counts for each of the N tokens."""

    student: Case
    teacher: Case
    kl_weight_N: torch.Tensor
    temperature: float

    def clone(self) -> Lesson:
        return Lesson(
            self.student.clone(), self.teacher.clone(), self.kl_weight_N.clone(), self.temperature
        )

    def assert_equal(self, other: Lesson) -> None:
        self.student.assert_equal(other.student)
        self.teacher.assert_equal(other.teacher)
        assert torch.equal(self.kl_weight_N, other.kl_weight_N)

    def shard(self, rank: int, size: int) -> Lesson:
        part = self.clone()
        for case in (part.student, part.teacher):
            case.weight_VD = case.weight_VD.chunk(size)[rank].clone()
        return part


def make_lesson(
    n: int,
    d: int,
    vocab_size: int,
    padded: int,
    *,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    temperature: float = 1.7,
) -> Lesson:
    return Lesson(
        make_case(n, d, vocab_size, padded, dtype=dtype, scale=0.5),
        make_case(n, WIDTH, vocab_size, padded, dtype=teacher_dtype or dtype, scale=0.5),
        torch.linspace(0.0, 1.0, n),
        temperature,
    )


Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def run(
    lesson: Lesson,
    kept_K: torch.Tensor | None,
    shard: VocabShard,
    *,
    keep_logits: bool = False,
    chunk_tokens: int = 10**6,
) -> Result:
    """(losses, gradient of all N hidden states, gradient of the student's weights)."""
    student, teacher = lesson.student, lesson.teacher
    statistics = head_statistics(
        student.hidden_ND,
        student.weight_VD,
        student.labels_N,
        shard,
        entropy=False,
        keep_logits=keep_logits,
    )
    before = None if statistics.logits_NV is None else statistics.logits_NV.clone()
    hidden_ND = student.hidden_ND.clone().requires_grad_()
    weight_VD = student.weight_VD.clone().requires_grad_()
    teacher_ND = teacher.hidden_ND.clone().requires_grad_()
    rows = slice(None) if kept_K is None else kept_K
    loss_S = selective_distillation(
        hidden_ND[rows],
        weight_VD,
        student.labels_N[rows],
        kept_K,
        statistics,
        teacher_ND[rows],
        teacher.weight_VD,
        shard,
        kl_weight=lesson.kl_weight_N[rows],
        temperature=lesson.temperature,
        chunk_bytes=8 * shard.num_rows * chunk_tokens,
    )
    loss_S.backward(upstream(len(loss_S)))
    assert teacher_ND.grad is None
    assert before is None or torch.equal(before, statistics.logits_NV)
    return loss_S.detach(), hidden_ND.grad, weight_VD.grad


def plain(lesson: Lesson, kept_K: torch.Tensor | None) -> Result:
    """Algorithm 3, line 7, with torch's own functions in float64."""
    student, teacher = lesson.student, lesson.teacher
    real, rho = student.vocab_size, lesson.temperature
    hidden_ND = student.hidden_ND.double().requires_grad_()
    weight_VD = student.weight_VD.double().requires_grad_()
    z_NV = (hidden_ND @ weight_VD.t())[:, :real]
    teacher_NV = (teacher.hidden_ND.double() @ teacher.weight_VD.double().t())[:, :real]
    kl_N = F.kl_div(
        (z_NV / rho).log_softmax(1),
        (teacher_NV / rho).log_softmax(1),
        reduction="none",
        log_target=True,
    ).sum(1)
    ce_N = F.cross_entropy(z_NV, student.labels_N, reduction="none")
    w_N = lesson.kl_weight_N.double()
    loss_N = w_N * kl_N + (1 - w_N) * ce_N
    loss_S = loss_N if kept_K is None else loss_N[kept_K]
    loss_S.backward(upstream(len(loss_S)).double())
    return loss_S.detach(), hidden_ND.grad, weight_VD.grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("which", ["none", "some", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_autograd(shape: tuple, which: str, keep_logits: bool, dtype: torch.dtype) -> None:
    shard = VocabShard.of(shape[2], shape[3])
    kept_K = kept_of(shape[0], which)
    for temperature, chunk_tokens in ((1.0, 1000), (1.7, 5), (0.4, 1)):
        lesson = make_lesson(*shape, dtype=dtype, temperature=temperature)
        before = lesson.clone()
        got = run(lesson, kept_K, shard, keep_logits=keep_logits, chunk_tokens=chunk_tokens)
        lesson.assert_equal(before)
        assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
        for mine, other in zip(got, plain(lesson, kept_K), strict=True):
            assert_close_in_norm(mine, other, TOLERANCE[dtype])
        assert not got[2][shape[2] :].any(), "padding rows of the head moved"


def test_no_tokens_at_all() -> None:
    for keep_logits in (False, True):
        got = run(make_lesson(0, 5, 17, 24), None, VocabShard.of(17, 24), keep_logits=keep_logits)
        assert got[0].shape == (0,)
        assert got[1].shape == (0, 5)
        assert not got[2].any()


def test_types_of_student_and_teacher_may_differ() -> None:
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        lesson = make_lesson(13, 5, 17, 24, dtype=dtypes[0], teacher_dtype=dtypes[1])
        got = run(lesson, None, VocabShard.of(17, 24))
        assert got[1].dtype == dtypes[0]
        for mine, other in zip(got, plain(lesson, None), strict=True):
            assert_close_in_norm(mine, other, TOLERANCE[torch.bfloat16])


def test_no_weight_is_the_causal_loss_and_a_teacher_like_the_student_teaches_nothing() -> None:
    lesson = make_lesson(13, 5, 17, 24)
    shard, student = VocabShard.of(17, 24), lesson.student
    lesson.kl_weight_N = torch.zeros(13)
    statistics = head_statistics(
        student.hidden_ND, student.weight_VD, student.labels_N, shard, entropy=False
    )
    hidden_ND = student.hidden_ND.clone().requires_grad_()
    weight_VD = student.weight_VD.clone().requires_grad_()
    loss_N = kept_linear_cross_entropy(
        hidden_ND, weight_VD, student.labels_N, None, statistics, shard
    )
    loss_N.backward(upstream(13))
    got = run(lesson, None, shard)
    assert torch.equal(got[0], loss_N)
    assert_close_in_norm(got[1], hidden_ND.grad, 1e-6)
    assert_close_in_norm(got[2], weight_VD.grad, 1e-6)

    lesson.kl_weight_N = torch.ones(13)
    lesson.teacher = student
    for x in run(lesson, None, shard):
        torch.testing.assert_close(x, torch.zeros_like(x), atol=3e-6, rtol=0)


def test_extreme_logits() -> None:
    """At a temperature that makes them 1e5, of which the student holds the other sign."""
    lesson = make_lesson(5, 1, 4, 6, temperature=0.1)
    hidden_ND = torch.tensor([[1e4], [-1e4], [1e4], [-1e4], [0.0]])
    weight_VD = torch.tensor([[1.0], [-1.0], [-1.0], [0.5], [99.0], [99.0]])
    labels_N = torch.tensor([0, 0, 1, 1, 2])
    lesson.student = Case(hidden_ND, weight_VD, labels_N, 4)
    lesson.teacher = Case(-hidden_ND, weight_VD, labels_N, 4)
    got = run(lesson, None, VocabShard.of(4, 6))
    for mine, other, tolerance in zip(got, plain(lesson, None), (1e-6, 5e-3, 5e-3), strict=True):
        assert mine.isfinite().all()
        assert_close_in_norm(mine, other, tolerance)


@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
def test_products_are_those_of_kept_tokens(keep_logits: bool) -> None:
    n, d, v = 64, 8, 96
    lesson = make_lesson(n, d, 90, v)
    kept_K = torch.arange(0, n, 4)
    with observe() as observed:
        run(lesson, kept_K, VocabShard.of(90, v), keep_logits=keep_logits, chunk_tokens=5)
    student = n * d * v + (2 if keep_logits else 4) * len(kept_K) * d * v
    assert observed.multiply_adds == student + 2 * len(kept_K) * WIDTH * v


@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
def test_no_float32_logits_in_bf16(keep_logits: bool) -> None:
    lesson = make_lesson(64, 8, 90, 96, dtype=torch.bfloat16)
    shard = VocabShard.of(90, 96)
    student = lesson.student
    statistics = head_statistics(
        student.hidden_ND,
        student.weight_VD,
        student.labels_N,
        shard,
        entropy=False,
        keep_logits=keep_logits,
        chunk_bytes=4 * 96 * 5,
    )
    with observe() as observed:
        selective_distillation(
            student.hidden_ND.requires_grad_(),
            student.weight_VD.requires_grad_(),
            student.labels_N,
            None,
            statistics,
            lesson.teacher.hidden_ND,
            lesson.teacher.weight_VD,
            shard,
            kl_weight=0.5,
            temperature=2.0,
            chunk_bytes=8 * 96 * 5,
        ).sum().backward()
    assert observed.largest_float32 <= 96 * 8  # the weights' gradient; logits are 64 * 96


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_agree_with_one_process(world_size: int) -> None:
    variants = [
        (lesson, kept_of(13, which), keep_logits)
        for lesson in (
            make_lesson(13, 5, 17, 24),  # of four shards the last is all padding
            make_lesson(13, 5, 9, 24, temperature=0.3),  # of four two are
            make_lesson(13, 4, 23, 24, dtype=torch.bfloat16),
        )
        for which in ("none", "some", "all")
        for keep_logits in (False, True)
    ]

    def on_rank(rank: int) -> list[Result]:
        results = []
        for lesson, kept_K, keep_logits in variants:
            case = lesson.student
            shard = VocabShard.of(case.vocab_size, len(case.weight_VD), dist.group.WORLD)
            part = lesson.shard(rank, world_size)
            results.append(run(part, kept_K, shard, keep_logits=keep_logits, chunk_tokens=4))
        return results

    ranks = run_ranks(world_size, on_rank)
    for i, (lesson, kept_K, keep_logits) in enumerate(variants):
        case = lesson.student
        shard = VocabShard.of(case.vocab_size, len(case.weight_VD))
        loss_S, grad_hidden, grad_weight = run(lesson, kept_K, shard, keep_logits=keep_logits)
        tolerance = TOLERANCE[case.hidden_ND.dtype]
        for rank in ranks:
            assert_close_in_norm(rank[i][0], loss_S, tolerance)
            assert_close_in_norm(rank[i][1], grad_hidden, tolerance)
            assert torch.equal(rank[i][1], ranks[0][i][1])
        assert_close_in_norm(torch.cat([rank[i][2] for rank in ranks]), grad_weight, tolerance)


def test_two_collectives_whatever_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_rank(rank: int) -> list[tuple[int, ...]]:
        sizes: list[tuple[int, ...]] = []
        ordinary = dist.all_reduce

        def counted(x: torch.Tensor, *args, **kwargs):
            sizes.append(tuple(x.shape))
            return ordinary(x, *args, **kwargs)

        lesson = make_lesson(13, 5, 17, 24)
        shard = VocabShard.of(17, 24, dist.group.WORLD)
        part = lesson.shard(rank, 2)
        monkeypatch.setattr(dist, "all_reduce", counted)
        run(part, kept_of(13, "some"), shard, chunk_tokens=2)
        return sizes

    # The statistics' two, then ours: two forward, the hidden gradient backward.
    assert run_ranks(2, on_rank)[0] == [(13,), (3, 13), (2, 9), (3, 9), (9, 5)]
