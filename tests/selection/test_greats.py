"""GREATS without a model: the greedy choice, and what the policy makes of it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.ghost_products import GradientProducts
from megatron_eslm.ops.keep_rule import EXCLUDED, num_to_keep
from megatron_eslm.selection.build import build_policy, policy_traits
from megatron_eslm.selection.policies.greats import Greats, choose_greedily
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, SelectionState

from .scoring import scored


def products_of(grads_MP: torch.Tensor, validation_P: torch.Tensor) -> GradientProducts:
    return GradientProducts(grads_MP @ grads_MP.t(), grads_MP @ validation_P)


def drawn(rows: int, seed: int = 0, shared: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of sequences and of validation, with a direction that all share."""
    rng = torch.Generator().manual_seed(seed)
    common_P = torch.randn(20, generator=rng)
    grads_MP = torch.randn(rows, 20, generator=rng) + shared * common_P
    return grads_MP, torch.randn(20, generator=rng) + shared * common_P


def second_order(
    grads_MP: torch.Tensor, validation_P: torch.Tensor, rate: float, row: int, chosen: list[int]
) -> float:
    """U(z | S) from the gradients themselves: z against what the update by S leaves of it."""
    ahead_P = validation_P.double() - rate * grads_MP[chosen].double().sum(dim=0)
    return float(grads_MP[row].double() @ ahead_P)


def by_brute_force(
    grads_MP: torch.Tensor, validation_P: torch.Tensor, rate: float, num: int
) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < num:
        left = [m for m in range(len(grads_MP)) if m not in chosen]
        gains = [second_order(grads_MP, validation_P, rate, m, chosen) for m in left]
        chosen.append(left[gains.index(max(gains))])
    return chosen


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.05, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("rows", [1, 2, 9, 12])
def test_the_choice_is_that_of_brute_force(rows: int, alpha: float, rate: float) -> None:
    for seed in range(5):
        grads_MP, validation_P = drawn(rows, seed, shared=0.5)
        products = products_of(grads_MP, validation_P)
        before = products.pairs_MM.clone(), products.validation_M.clone()
        choice = choose_greedily(products, rate, [True] * rows, alpha)
        num = num_to_keep(rows, alpha)
        assert choice.order == by_brute_force(grads_MP, validation_P, rate, num)
        for m, gain in enumerate(choice.gains):
            # At the time of choice; of the others, what they would gain next.
            ahead = choice.order[: choice.order.index(m)] if m in choice.order else choice.order
            expected = second_order(grads_MP, validation_P, rate, m, ahead)
            assert gain == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert torch.equal(products.pairs_MM, before[0])
        assert torch.equal(products.validation_M, before[1])


def test_a_copy_waits_until_others_were_chosen() -> None:
    best, copy = [3.0, 0.0, 0.0], [3.0, 0.0, 0.0]
    grads_MP = torch.tensor([best, copy, [0.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
    products = products_of(grads_MP, torch.tensor([1.0, 1.0, 1.0]))
    corrected = choose_greedily(products, 0.4, [True] * 4, 0.25)
    assert corrected.order == [0, 2, 3]
    assert corrected.gains[1] == pytest.approx(3.0 - 0.4 * 9.0)
    # Without the correction it is as good as the first one.
    assert choose_greedily(products, 0.0, [True] * 4, 0.25).order == [0, 1, 2]


def test_ties_go_to_the_lower_index() -> None:
    products = GradientProducts(torch.zeros(5, 5), torch.ones(5))
    assert choose_greedily(products, 1.0, [True] * 5, 0.4).order == [0, 1, 2]


def test_sequences_without_labels_are_never_chosen() -> None:
    products = GradientProducts(torch.eye(4), torch.tensor([0.0, -2.0, -1.0, -3.0]))
    choice = choose_greedily(products, 0.1, [False, True, True, True], 0.3)
    assert choice.order == [2, 1]  # two of three
    assert choice.gains[0] == EXCLUDED
    nobody = choose_greedily(products, 0.1, [False] * 4, 0.3)
    assert nobody.order == [] and nobody.gains == [EXCLUDED] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    grads_MP, validation_P = drawn(6)
    products = products_of(grads_MP, validation_P)
    others = [0, 1, 3, 4, 5]
    alone = choose_greedily(
        products_of(grads_MP[others], validation_P), 0.1, [True] * 5, 0.4
    )  # three of five, as it will be beside the bad one
    products.pairs_MM[2] = products.pairs_MM[:, 2] = math.nan
    products.validation_M[2] = bad
    choice = choose_greedily(products, 0.1, [True] * 6, 1 / 3)
    assert choice.order == [2, *(others[m] for m in alone.order)]
    assert math.isnan(choice.gains[2])
    assert all(math.isfinite(choice.gains[m]) for m in others)


def policy(alpha: float = 0.25) -> Greats:
    options = SelectionOptions(selection="greats", eslm_alpha=alpha)
    built = build_policy(options, SelectionState(alpha=alpha), Peers(0, 1, None), seed=0)
    assert isinstance(built, Greats)
    return built


def batch_of(rows: int) -> Batch:
    return Batch.of(torch.zeros(rows, 4, dtype=torch.long), torch.ones(rows, 3, dtype=torch.bool))


def test_the_policy_keeps_what_was_chosen_once() -> None:
    got = policy()
    traits = got.traits
    assert (traits.sequence_source, traits.token_source) == ("policy", "nothing")
    assert traits.early_exit_blocks == 0 and traits.needs_gradients
    # Opposite gradients: once the first is chosen the third gains more than the first did, and
    # once both are, the second would gain most of all.
    pairs_MM = torch.tensor([[1.0, 0.0, -9.0, 0.0], [0.0, 1.0, -90.0, 0.0],
                             [-9.0, -90.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])  # fmt: skip
    products = GradientProducts(pairs_MM, torch.tensor([3.0, 0.0, 1.0, 2.0]))
    batch = batch_of(4)
    got.state.alpha = 0.5
    got.choose(products, 1.0, batch)
    scores_M = got.score_sequences(scored(got, batch.valid_MT))
    assert scores_M.tolist() == [3.0, 90.0, 10.0, 2.0]
    kept = got.keep(scores_M, "test")
    assert kept.keep.tolist() == [True, False, True, False]
    assert (kept.tau, kept.num_scores, kept.num_kept, kept.num_nonfinite) == (3.0, 4, 2, 0)
    with pytest.raises(AssertionError, match="before its sequences were chosen"):
        got.score_sequences(scored(got, batch.valid_MT))


def test_scores_that_are_not_finite_are_counted() -> None:
    got, batch = policy(), batch_of(4)
    products = GradientProducts(torch.full((4, 4), math.nan), torch.full((4,), math.nan))
    got.choose(products, 1.0, batch)
    kept = got.keep(got.score_sequences(scored(got, batch.valid_MT)), "test")
    assert kept.num_nonfinite == 4 and kept.keep.all() and math.isnan(kept.tau)


def test_nothing_is_asked_for_where_everything_is_kept() -> None:
    got = policy()
    assert got.drops_rows(4) and not got.drops_rows(1)
    got.state.alpha = 0.0
    assert not got.drops_rows(4)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"--greats-valid-share .* is outside"):
        SelectionOptions(selection="greats", greats_valid_share=share)


def test_token_level_is_refused() -> None:
    options = SelectionOptions(selection="greats", eslm_level="token")
    with pytest.raises(ConfigError, match=r"--eslm-level token leaves .* greats.* sequences only"):
        policy_traits(options)
