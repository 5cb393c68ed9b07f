"""Policies without a model: where scores come from and what they are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.head.statistics import HeadStatistics
from megatron_eslm.ops.keep_rule import EXCLUDED
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.policies.clm import CausalLM
from megatron_eslm.selection.policies.eslm import ESLM
from megatron_eslm.selection.policies.random_control import RandomControl
from megatron_eslm.selection.policy import SelectionPolicy, register
from megatron_eslm.selection.registry import POLICIES
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, Recorder, SelectionRecord, SelectionState

from ..harness import run_ranks
from .scoring import scored

ALONE = Peers(0, 1, None)


def policy(
    *, peers: Peers = ALONE, seed: int = 0, iteration: int = 0, micro_step: int = 0, **options
) -> SelectionPolicy:
    selection = SelectionOptions(**options)
    state = SelectionState(selection.eslm_alpha, iteration, micro_step)
    return build_policy(selection, state, peers, seed)


def test_names_build_their_classes() -> None:
    assert type(policy(selection="clm")) is CausalLM
    assert type(policy(selection="eslm")) is ESLM
    assert type(policy(selection="random")) is RandomControl


def test_a_policy_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_eslm.selection.policy.POLICIES", {})
    cls = type("Mine", (CausalLM,), {})
    assert register("mine")(cls) is cls
    assert cls.name == "mine"
    with pytest.raises(AssertionError, match="mine"):
        register("mine")(cls)
    assert "mine" not in POLICIES


@pytest.mark.parametrize(
    ("options", "sources", "depth"),
    [
        ({"selection": "clm"}, ("nothing", "nothing"), 0),
        ({"eslm_level": "both", "eslm_proxy_layers": 2}, ("head", "head"), 2),
        ({"eslm_level": "instance"}, ("head", "nothing"), 1),
        ({"eslm_level": "token", "eslm_proxy_layers": 2}, ("nothing", "head"), 0),
        ({"selection": "random"}, ("policy", "policy"), 0),
        ({"selection": "random", "eslm_level": "instance"}, ("policy", "nothing"), 0),
        ({"selection": "random", "eslm_level": "token"}, ("nothing", "policy"), 0),
    ],
    ids=str,
)
def test_where_scores_come_from(options: dict, sources: tuple, depth: int) -> None:
    got = policy(**options)
    assert (got.traits.sequence_source, got.traits.token_source) == sources
    assert got.traits.early_exit_blocks == depth
    # Another policy of the same class keeps its own sources.
    assert policy(selection=got.name).traits.token_source == type(got).token_source


def test_entropy_is_computed_only_for_the_policy_that_needs_it() -> None:
    assert policy(eslm_score="entropy").traits.needs_entropy
    assert not policy(eslm_score="loss").traits.needs_entropy
    assert not policy(selection="random", eslm_score="entropy").traits.needs_entropy
    assert not policy(selection="clm", eslm_score="entropy").traits.needs_entropy


def test_risk_is_the_statistic_that_is_asked_for() -> None:
    loss_N, entropy_N = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    statistics = HeadStatistics(loss_N, torch.zeros(2), entropy_N, None)
    assert policy(eslm_score="loss").token_risk(statistics) is loss_N
    assert policy(eslm_score="entropy").token_risk(statistics) is entropy_N


def test_a_sequence_scores_the_mean_over_its_valid_positions() -> None:
    risk_MT = torch.tensor([[1.0, 2.0, 6.0], [1.0, math.nan, 5.0], [7.0, 7.0, 7.0]])
    valid_MT = torch.tensor([[True] * 3, [True, False, True], [False] * 3])
    before = risk_MT.clone()
    got = policy()
    scores_M = got.sequence_scores(scored(got, valid_MT, risk_MT))
    assert scores_M.tolist() == [3.0, 3.0, EXCLUDED]
    assert torch.equal(risk_MT.nan_to_num(), before.nan_to_num())


def test_a_valid_nan_makes_the_score_nan() -> None:
    risk_MT = torch.tensor([[1.0, math.nan], [1.0, math.inf]])
    got, valid_MT = policy(), torch.ones(2, 2, dtype=torch.bool)
    scores_M = got.sequence_scores(scored(got, valid_MT, risk_MT))
    assert scores_M.isnan().tolist() == [True, False]
    assert scores_M[1] == math.inf


def test_alpha_is_that_of_the_state_not_of_the_options() -> None:
    """A controller moves it."""
    got = policy(eslm_alpha=0.5)
    assert got.keep(torch.arange(10.0), "test").num_kept == 5
    got.state.alpha = 0.2
    assert got.keep(torch.arange(10.0), "test").num_kept == 8


def test_scope() -> None:
    def on_rank(rank: int) -> tuple[list[bool], list[bool]]:
        scores = torch.arange(4.0) + 10 * rank
        peers = Peers(rank, 2, dist.group.WORLD)
        both = [
            policy(peers=peers, eslm_alpha=0.5, eslm_scope=scope).keep(scores, "test").keep.tolist()
            for scope in ("global", "local")
        ]
        return both[0], both[1]

    alone = [False, False, True, True]
    assert run_ranks(2, on_rank) == [([False] * 4, alone), ([True] * 4, alone)]


def random_kept(size: int, rows: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tokens that the random control keeps of a global batch split over `size` ranks."""
    level = options.pop("level", "instance")
    positions = 6
    kept, scores = [], []
    for rank in range(size):  # the shares of all ranks, without processes
        one = policy(selection="random", peers=Peers(rank, size, None), **options)
        valid_MT = torch.ones(rows // size, positions, dtype=torch.bool)
        score = one.score_sequences if level == "instance" else one.score_tokens
        scores.append(score(scored(one, valid_MT)))
    everything = torch.cat(scores)
    kept = policy(selection="random", **options).keep(everything, "test").keep
    return everything, kept


@pytest.mark.parametrize("level", ["instance", "token"])
def test_random_draws_do_not_depend_on_the_layout(level: str) -> None:
    options = {"level": level, "iteration": 5, "micro_step": 2, "seed": 9}
    whole, kept = random_kept(1, 8, **options)
    for size in (2, 4, 8):
        split, split_kept = random_kept(size, 8, **options)
        assert torch.equal(split, whole)
        assert torch.equal(split_kept, kept)


@pytest.mark.parametrize("level", ["instance", "token"])
def test_random_draws_anew_at_every_micro_step(level: str) -> None:
    draws = [
        random_kept(1, 8, level=level, seed=seed, iteration=iteration, micro_step=micro)[0]
        for seed, iteration, micro in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    for i, draw in enumerate(draws):
        assert all(not torch.equal(draw, other) for other in draws[i + 1 :])
    again = random_kept(1, 8, level=level, seed=0)[0]
    assert torch.equal(again, draws[0])


def test_random_leaves_torchs_own_stream_alone() -> None:
    before = torch.random.get_rng_state()
    random_kept(1, 8)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
def test_random_keeps_its_share_and_every_place_as_often(alpha: float) -> None:
    steps, rows = 400, 10
    kept = torch.stack(
        [random_kept(1, rows, iteration=i, eslm_alpha=alpha)[1] for i in range(steps)]
    ).float()
    assert (kept.sum(dim=1) == round((1 - alpha) * rows)).all()
    # Five standard deviations of a proportion.
    spread = 5 * math.sqrt(alpha * (1 - alpha) / steps)
    assert (kept.mean(dim=0) - (1 - alpha)).abs().max() <= spread + 1e-6


def test_random_gives_rows_without_labels_no_place() -> None:
    valid_MT = torch.tensor([[True, False], [False, False], [False, True]])
    got = policy(selection="random")
    scores_M = got.sequence_scores(scored(got, valid_MT))
    assert (scores_M == EXCLUDED).tolist() == [False, True, False]


def test_each_micro_step_has_a_record_and_taking_them_starts_anew() -> None:
    recorder = Recorder()
    assert recorder.begin() == 0
    recorder.record.num_rows = 3
    assert recorder.begin() == 1
    assert recorder.record == SelectionRecord()
    assert [record.num_rows for record in recorder.take()] == [3, 0]
    assert recorder.take() == []
    assert recorder.begin() == 0


def test_excess_is_risk_minus_that_of_the_reference() -> None:
    got = policy(eslm_score="excess")
    assert got.traits.needs_reference and not got.traits.needs_entropy
    valid_MT = torch.tensor([[True, True], [True, False]])
    risk_MT = torch.tensor([[3.0, 5.0], [4.0, 9.0]])
    reference_MT = torch.tensor([[1.0, 2.0], [5.0, math.inf]])
    batch = scored(got, valid_MT, risk_MT)._replace(reference_MP=reference_MT)
    assert got.sequence_scores(batch).tolist() == [2.5, -1.0]
    assert got.token_scores(batch, valid_MT).tolist() == [[2.0, 3.0], [-1.0, EXCLUDED]]
    unknown = batch._replace(reference_MP=torch.full((2, 2), math.inf))
    assert got.sequence_scores(unknown).isnan().all()


def test_adaptive_alpha_does_not_follow_excess() -> None:
    with pytest.raises(ConfigError, match=r"--eslm-adaptive .* --eslm-score excess may be zero"):
        SelectionOptions(eslm_score="excess", eslm_adaptive=True)
