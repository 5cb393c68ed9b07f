"""How alpha moves: start, warm-up, schedule, Algorithm 2 against its own lines, references."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.alpha import AlphaController
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import SelectionState

TRAIN_ITERS = 8


def alphas(
    cvars: list[float | None],
    state: SelectionState | None = None,
    excesses: list[float | None] | None = None,
    **flags,
) -> list[float]:
    """alpha of each step of a run that sees these CVaRs and mean excess losses."""
    options = SelectionOptions(**flags)
    state = state or SelectionState(alpha=options.initial_alpha)
    controller = AlphaController(options, state, TRAIN_ITERS)
    seen = []
    for step, cvar in enumerate(cvars):
        controller.begin_step(step)
        seen.append(state.alpha)
        controller.end_step(step, cvar, excesses[step] if excesses else None)
    return seen


def algorithm_2(cvars: list[float], alpha: float, gamma: float, epsilon: float) -> list[float]:
    """Lines 15 to 21 at interval 1, but for the first one, which has nothing to compare with."""
    seen, history = [], []
    for cvar in cvars:
        seen.append(alpha)
        if history:
            delta = (cvar - history[-1]) / (abs(history[-1]) + epsilon)
            alpha = alpha * math.exp(-gamma * delta)
        history.append(cvar)
    return seen


def test_without_flags_alpha_stays() -> None:
    assert alphas([3.0, 2.0, 9.0]) == [0.1] * 3


def test_algorithm_2() -> None:
    cvars = [8.0, 6.0, 6.0, 7.5, 2.0, -1.0, -0.5]
    expected = algorithm_2(cvars, 0.1, 0.5, 1e-8)
    assert alphas(cvars, eslm_adaptive=True, eslm_adapt_interval=1) == pytest.approx(expected)
    assert expected[1] == 0.1 < expected[2] and expected[4] < expected[3]


def test_an_interval_is_the_mean_of_its_steps() -> None:
    cvars = [9.0, 7.0, 6.0, 2.0, 1.0, 1.0]
    seen = alphas(cvars, eslm_adaptive=True, eslm_adapt_interval=2, eslm_gamma=0.3)
    assert seen[:4] == [0.1] * 4
    assert seen[4:] == pytest.approx([0.1 * math.exp(0.3 * 0.5)] * 2)  # 8 -> 4


def test_steps_without_a_finite_cvar_teach_nothing() -> None:
    flags = {"eslm_adaptive": True, "eslm_adapt_interval": 2}
    with_gap = alphas([8.0, math.nan, 4.0, None, 1.0], **flags)
    assert with_gap == pytest.approx(alphas([8.0, 8.0, 4.0, 4.0, 1.0], **flags))
    nothing = alphas([8.0, 8.0, math.nan, math.nan, 4.0, 4.0, 1.0], **flags)
    assert nothing[:6] == [0.1] * 6 and nothing[6] > 0.1


def test_alpha_stays_within_its_bounds() -> None:
    flags = {"eslm_adaptive": True, "eslm_adapt_interval": 1, "eslm_gamma": 5.0}
    flags |= {"eslm_alpha_min": 0.05, "eslm_alpha_max": 0.2}
    seen = alphas([8.0, 1.0, 8.0, 8.0], **flags)
    assert seen[2] == 0.2 and seen[3] == 0.05
    # From next to nothing to much and back: e^(gamma delta) is more than a float holds.
    seen = alphas([1e-9, -8.0, 8.0], **flags | {"eslm_adapt_epsilon": 1e-12})
    assert seen[2] == 0.2


def test_alpha_begins_late_and_rises() -> None:
    seen = alphas([5.0] * 8, eslm_alpha=0.2, eslm_start_iter=2, eslm_alpha_warmup_iters=3)
    assert seen == pytest.approx([0, 0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert alphas([5.0] * 3, eslm_start_iter=2) == [0, 0, 0.1]


def test_a_schedule_rises_or_falls_to_the_last_step() -> None:
    falling = alphas([5.0] * 8, eslm_alpha=0.7, eslm_alpha_end=0.0)
    assert falling == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    flags = {"eslm_alpha": 0.1, "eslm_alpha_end": 0.3, "eslm_start_iter": 1}
    rising = alphas([5.0] * 8, **flags, eslm_alpha_end_iter=5, selection="random")
    assert rising == pytest.approx([0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.3, 0.3])
    warm = alphas([5.0] * 8, **flags, eslm_alpha_end_iter=5, eslm_alpha_warmup_iters=1)
    assert warm == pytest.approx([0.0, 0.05, *rising[2:]])
    assert alphas([5.0] * 2, selection="clm", eslm_alpha_end=0.3) == [0.0, 0.0]


def test_alpha_is_zero_from_where_a_reference_is_overtaken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Smoothed: 1.0, 0.89, 0.77, then 0.1 of -8 and 0.9 of 0.77 is below 0.
    excesses = [1.0, -0.1, -0.3, -8.0, None, None]
    flags = {"eslm_score": "excess", "eslm_alpha": 0.2}
    state = SelectionState(alpha=0.2)
    assert alphas([1.0] * 6, state, excesses, **flags) == [0.2] * 4 + [0.0] * 2
    assert state.overtaken_at == 3
    assert state.mean_excess == pytest.approx(0.9 * (0.9 * (0.9 - 0.01) - 0.03) - 0.8)
    assert "overtaken its reference at iteration 4" in caplog.text
    assert "alpha is 0 from here on" in caplog.text
    kept = alphas([1.0] * 6, None, [*excesses[:4], 9.0, -9.0], **flags, eslm_overtaken="keep")
    assert kept == [0.2] * 6
    assert caplog.text.count("selection goes on") == 1
    assert alphas([1.0] * 3, None, [math.nan, math.nan, 1.0], **flags) == [0.2] * 3


def test_the_controller_waits_for_the_warm_up() -> None:
    flags = {"eslm_adaptive": True, "eslm_adapt_interval": 1, "eslm_alpha_warmup_iters": 1}
    seen = alphas([100.0, 8.0, 4.0, 4.0], **flags)
    assert seen == pytest.approx([0.05, 0.1, 0.1, 0.1 * math.exp(0.25)])


def test_the_state_carries_all_of_it_over_a_restart() -> None:
    flags = {"eslm_adaptive": True, "eslm_adapt_interval": 3, "eslm_alpha_warmup_iters": 1}
    cvars = [9.0, 8.0, 7.5, 6.0, 3.0, 4.0, 4.5, 2.0, 1.0]
    whole = alphas(cvars, **flags)
    for cut in range(1, len(cvars)):
        options = SelectionOptions(**flags)
        state = SelectionState(alpha=options.initial_alpha)
        controller = AlphaController(options, state, TRAIN_ITERS)
        for step, cvar in enumerate(cvars[:cut]):
            controller.begin_step(step)
            controller.end_step(step, cvar)
        controller = AlphaController(options, SelectionState(**asdict(state)), TRAIN_ITERS)
        rest = []
        for step, cvar in enumerate(cvars[cut:], start=cut):
            controller.begin_step(step)
            rest.append(controller.state.alpha)
            controller.end_step(step, cvar)
        assert rest == whole[cut:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"eslm_start_iter": -1}, ["--eslm-start-iter -1", "0 or more"]),
        ({"eslm_alpha_warmup_iters": -2}, ["--eslm-alpha-warmup-iters -2"]),
        ({"eslm_adapt_interval": 0}, ["--eslm-adapt-interval 0"]),
        ({"eslm_gamma": 0.0}, ["--eslm-gamma 0", "above 0"]),
        ({"eslm_alpha_min": 0.3, "eslm_alpha_max": 0.2}, ["--eslm-alpha-min 0.3", "0.2"]),
        (
            {"eslm_adaptive": True, "selection": "random"},
            ["--selection random", "--selection eslm"],
        ),
        ({"eslm_adaptive": True, "eslm_level": "instance"}, ["--eslm-level instance"]),
        ({"eslm_alpha_end": 1.0}, ["--eslm-alpha-end 1"]),
        ({"eslm_alpha_end": 0.2, "eslm_adaptive": True}, ["--eslm-adaptive are two rules"]),
        ({"eslm_alpha_end_iter": 5}, ["--eslm-alpha-end-iter 5", "without --eslm-alpha-end"]),
        (
            {"eslm_alpha_end": 0.2, "eslm_start_iter": 5, "eslm_alpha_end_iter": 5},
            ["--eslm-alpha-end-iter 5", "--eslm-start-iter 5"],
        ),
        (
            {"eslm_alpha_end": 0.2, "selection": "uncertainty"},
            ["--eslm-alpha-end 0.2", "--uncertainty-quantile"],
        ),
        ({"eslm_adaptive": True, "eslm_alpha": 0.0}, ["--eslm-alpha 0", "--eslm-alpha-min"]),
    ],
)
def test_what_cannot_be_is_refused(flags: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        SelectionOptions(**flags)
    assert all(word in str(caught.value) for word in words)
