"""The keep rule against a sorted Python list, on one rank and on several."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.ops.keep_rule import (
    EXCLUDED,
    KeepDecision,
    StepShape,
    keep_number,
    keep_riskiest,
    num_to_keep,
)

from ..harness import run_ranks


def plain_keep(scores: list[float], alpha: float) -> tuple[list[bool], float]:
    """(kept, tau) by sorting: riskiest first, of equal ones the lower index first."""

    def risk(score: float) -> float:
        return math.inf if math.isnan(score) else score

    candidates = [i for i, score in enumerate(scores) if score != EXCLUDED]
    k = max(1, math.floor((1 - alpha) * len(candidates) + 1e-9)) if candidates else 0
    kept = sorted(candidates, key=lambda i: (-risk(scores[i]), i))[:k]
    tau = min((risk(scores[i]) for i in kept), default=math.nan)
    return [i in kept for i in range(len(scores))], tau


def keep(scores: list[float], alpha: float) -> KeepDecision:
    return keep_riskiest(torch.tensor(scores), alpha)


@pytest.mark.parametrize(
    ("num_scores", "alpha", "k"),
    [
        (12, 0.1, 10),
        (8, 0.1, 7),
        (4, 0.1, 3),
        (12, 0.0, 12),
        (10, 0.1, 9),  # 0.9 * 10 is 9 exactly, in float arithmetic too
        (10, 0.3, 7),  # 0.7 * 10 is 7.000000000000001 or 6.999999999999999: both mean 7
        (1000, 0.9, 100),
        (1, 0.0, 1),
        (1, 0.99, 1),
        (2, 0.9, 1),
        (0, 0.1, 0),
        (12 * 1024 * 256, 0.1, 2831155),
    ],
)
def test_number_kept(num_scores: int, alpha: float, k: int) -> None:
    assert num_to_keep(num_scores, alpha) == k
    if num_scores <= 1000:
        got = keep_riskiest(torch.rand(num_scores), alpha)
        assert (got.num_scores, got.num_kept, int(got.keep.sum())) == (num_scores, k, k)


@pytest.mark.parametrize("percent", range(100))
def test_number_kept_is_the_exact_floor(percent: int) -> None:
    for num_scores in (1, 2, 3, 7, 10, 12, 50, 100, 1000, 1024, 12288, 10**6):
        exact = (100 - percent) * num_scores // 100
        assert num_to_keep(num_scores, percent / 100) == max(1, exact)


def test_keeps_the_largest_and_tau_is_the_smallest_kept() -> None:
    got = keep([0.5, 3.0, 1.0, 2.0], 0.5)
    assert got.keep.tolist() == [False, True, False, True]
    assert got.tau == 2.0
    assert got.num_nonfinite == 0


def test_ties_go_to_the_lower_index() -> None:
    assert keep([1.0, 1.0, 1.0, 1.0], 0.5).keep.tolist() == [True, True, False, False]
    # What is above the threshold comes first, however late it stands: 2.0 takes one of three.
    assert keep([1.0, 0.0, 1.0, 1.0, 2.0, 0.0], 0.5).keep.tolist() == [
        True,
        False,
        True,
        False,
        True,
        False,
    ]


def test_positive_and_negative_zero_are_a_tie() -> None:
    assert keep([-0.0, 0.0, -1.0], 0.5).keep.tolist() == [True, False, False]


@pytest.mark.parametrize("scores", [[1.0, -2.0, 1.0], [0.0], [math.inf, 1.0], [math.nan, 0.0]])
def test_alpha_zero_keeps_all(scores: list[float]) -> None:
    got = keep(scores, 0.0)
    assert got.keep.all()
    assert got.num_kept == got.num_scores == len(scores)


def test_excluded_entries_take_no_part() -> None:
    scores = torch.tensor([EXCLUDED, 1.0, EXCLUDED, 3.0, -50.0, 2.0])
    got = keep_riskiest(scores, 0.5)
    assert got.keep.tolist() == [False, False, False, True, False, True]
    assert (got.num_scores, got.num_kept, got.tau) == (4, 2, 2.0)
    everything = keep_riskiest(scores, 0.0)
    assert everything.keep.tolist() == (scores != EXCLUDED).tolist()
    assert (everything.num_scores, everything.num_kept, everything.tau) == (4, 4, -50.0)


def test_nothing_takes_part() -> None:
    got = keep_riskiest(torch.full((2, 3), EXCLUDED), 0.1)
    assert got.keep.shape == (2, 3)
    assert not got.keep.any()
    assert (got.num_scores, got.num_kept, got.num_nonfinite) == (0, 0, 0)
    assert math.isnan(got.tau)
    assert math.isnan(got.cvar)


def test_nan_and_inf_are_the_riskiest_and_counted() -> None:
    got = keep([5.0, math.nan, 1.0, math.inf, 2.0, 9.0], 0.5)
    assert got.keep.tolist() == [False, True, False, True, False, True]
    assert got.num_nonfinite == 2
    assert got.tau == 9.0
    only_one = keep([5.0, math.nan, 1.0, math.inf], 0.75)
    assert only_one.keep.tolist() == [False, True, False, False]  # a tie between the two
    assert only_one.num_nonfinite == 2


def risk_at(tau: float, scores: torch.Tensor, alpha: float) -> float:
    """What eq. 2 minimises."""
    return tau + (scores.double() - tau).clamp(min=0).mean().item() / (1 - alpha)


@pytest.mark.parametrize(
    ("num_scores", "alpha"), [(10, 0.1), (20, 0.25), (8, 0.5), (7, 0.0), (1, 0.0)]
)
def test_cvar_is_the_minimum_of_eq_2(num_scores: int, alpha: float) -> None:
    """Where (1 - alpha) N is a whole number; the minimum lies at one of the scores."""
    scores = torch.randn(num_scores, generator=torch.Generator().manual_seed(num_scores))
    minimum = min(risk_at(tau, scores, alpha) for tau in scores.tolist())
    got = keep_riskiest(scores, alpha)
    assert got.cvar == pytest.approx(minimum, abs=1e-6)
    # ... and is the mean of what is kept, the loss of Algorithm 1, line 11.
    assert got.cvar == pytest.approx(scores[got.keep].double().mean().item(), abs=1e-6)
    grid = torch.linspace(scores.min().item() - 1, scores.max().item() + 1, 2001).tolist()
    assert minimum <= min(risk_at(tau, scores, alpha) for tau in grid) + 1e-9


@pytest.mark.parametrize(("num_scores", "alpha"), [(12, 0.1), (7, 0.3), (9, 0.05)])
def test_cvar_with_a_fraction_left_over_is_eq_2_at_tau(num_scores: int, alpha: float) -> None:
    """Then eq. 2 is least at the largest dropped score; at tau it is a known bit above."""
    scores = torch.randn(num_scores, generator=torch.Generator().manual_seed(num_scores))
    got = keep_riskiest(scores, alpha)
    assert got.cvar == pytest.approx(risk_at(got.tau, scores, alpha), abs=1e-6)
    minimum = min(risk_at(tau, scores, alpha) for tau in scores.tolist())
    gap = got.tau - scores[~got.keep].max().item()
    above = gap * (1 - got.num_kept / ((1 - alpha) * num_scores))
    assert got.cvar == pytest.approx(minimum + above, abs=1e-6)


def test_cvar_ignores_excluded_entries() -> None:
    scores = torch.tensor([4.0, EXCLUDED, 2.0, 1.0, EXCLUDED, 3.0])
    assert keep_riskiest(scores, 0.5).cvar == keep_riskiest(scores[scores != EXCLUDED], 0.5).cvar


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_scores_are_not_changed(alpha: float) -> None:
    scores = torch.tensor([[1.0, math.nan, EXCLUDED], [math.inf, 1.0, 1.0]])
    before = scores.clone()
    keep_riskiest(scores, alpha)
    keep_riskiest(scores.t(), alpha)
    assert torch.equal(scores.nan_to_num(-7.0), before.nan_to_num(-7.0))


def test_any_shape_in_row_order() -> None:
    scores = torch.tensor([[1.0, 0.0, 2.0], [2.0, 2.0, 1.0]])
    assert keep_riskiest(scores, 0.5).keep.tolist() == [[False, False, True], [True, True, False]]
    # Not the order in memory: the position in the flattened tensor decides ties.
    got = keep_riskiest(scores.t().contiguous().t(), 0.34)
    assert got.keep.tolist() == [[False, False, True], [True, True, False]]


def test_half_precision_is_refused() -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        keep_riskiest(torch.ones(3, dtype=torch.bfloat16), 0.1)


def random_scores(rng: random.Random, size: int) -> list[float]:
    """Few distinct values, so that ties are the rule, with some of everything else."""
    special = [EXCLUDED, math.inf, math.nan, 0.0, -0.0]
    return [
        rng.choice(special) if rng.random() < 0.15 else float(rng.randint(-3, 3))
        for _ in range(size)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_against_sorting(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        scores = random_scores(rng, rng.randint(1, 60))
        alpha = rng.choice([0.0, 0.05, 0.1, 0.3, 0.5, 0.9, rng.random()])
        got = keep(scores, alpha)
        kept, tau = plain_keep(scores, alpha)
        assert got.keep.tolist() == kept, (scores, alpha)
        assert got.tau == pytest.approx(tau, nan_ok=True)
        assert got.num_kept == sum(kept)
        assert got.num_nonfinite == sum(math.isnan(s) or s == math.inf for s in scores)


def fields(kept: KeepDecision) -> tuple:
    """Everything but `keep`, comparable (nan equals itself)."""
    values = (kept.tau, kept.cvar, kept.num_scores, kept.num_kept, kept.num_nonfinite)
    return tuple(repr(value) for value in values)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_group_decides_as_one_rank_would(world_size: int) -> None:
    rng = random.Random(world_size)
    cases = [
        (torch.tensor(random_scores(rng, 8 * width)).view(8, width), rng.choice([0.0, 0.1, 0.4]))
        for width in (1, 3, 17)
        for _ in range(6)
    ]
    # One rank whose scores are all excluded, one with all there is, and none with any.
    lonely = torch.full((8, 5), EXCLUDED)
    cases.append((lonely.clone(), 0.1))
    lonely[-1, 2:] = torch.tensor([1.0, 1.0, 2.0])
    cases.append((lonely, 0.4))
    cases.append((torch.ones(8, 4), 0.3))

    def on_rank(rank: int) -> list[tuple[torch.Tensor, tuple]]:
        mine = [(keep_riskiest(s.chunk(world_size)[rank], a, dist.group.WORLD)) for s, a in cases]
        return [(kept.keep, fields(kept)) for kept in mine]

    ranks = run_ranks(world_size, on_rank)
    for i, (scores, alpha) in enumerate(cases):
        alone = keep_riskiest(scores, alpha)
        assert torch.equal(torch.cat([rank[i][0] for rank in ranks]), alone.keep), (scores, alpha)
        assert all(rank[i][1] == fields(alone) for rank in ranks)


def test_without_a_group_each_rank_decides_alone() -> None:
    scores = torch.tensor([[1.0, 2.0], [30.0, 40.0]])
    ranks = run_ranks(2, lambda rank: keep_riskiest(scores[rank], 0.5).keep.tolist())
    assert ranks == [[False, True], [False, True]]


@pytest.mark.parametrize("seed", range(20))
def test_a_number_of_scores_is_kept(seed: int) -> None:
    """The riskiest, ties to the lower index, what takes no part last."""
    rng = random.Random(seed)
    choices = [EXCLUDED, 0.5, 1.0, 1.5, math.nan, math.inf, -2.0]
    scores = [rng.choice(choices) for _ in range(12)]
    num = rng.randint(1, 12)

    def risk(i: int) -> float:
        return math.inf if math.isnan(scores[i]) else scores[i]

    kept = sorted(range(12), key=lambda i: (-risk(i), i))[:num]
    got = keep_number(torch.tensor(scores), num)
    assert got.keep.nonzero().flatten().tolist() == sorted(kept)
    tau = min((risk(i) for i in kept if scores[i] != EXCLUDED), default=math.nan)
    assert got.tau == tau or (math.isnan(got.tau) and math.isnan(tau))
    assert got.num_nonfinite == sum(math.isnan(s) or s == math.inf for s in scores)
    assert got.num_scores == sum(s != EXCLUDED for s in scores)
    assert got.num_kept == num


@pytest.mark.parametrize(
    ("read", "alpha", "kept"),
    [
        ((10, 4), 0.1, (9, 4)),
        ((10, 4), 0.0, (10, 4)),
        ((6, 1), 0.1, (5, 1)),
        ((16, 4), 0.1, (14, 4)),
        ((15, 4), 0.1, (14, 4)),  # 13.5, which float arithmetic must not make 13
        ((20, 2), 0.5, (10, 2)),
        ((3, 2), 0.5, (2, 2)),
        ((2, 8), 0.99, (1, 8)),
        # Too few micro-steps: rows of each; halves keep the larger number.
        ((5, 4), 0.1, (5, 4)),
        ((5, 5), 0.1, (5, 5)),
        ((5, 6), 0.1, (5, 5)),
        ((1, 16), 0.1, (1, 14)),
        ((1, 12), 0.1, (1, 11)),
        ((1, 1), 0.9, (1, 1)),
    ],
)
def test_shape_that_is_kept(read: tuple[int, int], alpha: float, kept: tuple[int, int]) -> None:
    assert StepShape(*read).kept(alpha) == kept
    assert StepShape(*read).kept(alpha).sequences == kept[0] * kept[1]
