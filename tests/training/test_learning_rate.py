"""Learning rate by iteration, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_eslm.config.training_options import OptimizerOptions
from megatron_eslm.engine.learning_rate import learning_rate
from tests.harness import run_ranks

from .runs import train, words

PAPER = OptimizerOptions(lr=6e-4, min_lr=6e-5, lr_warmup_iters=2000, lr_decay_iters=200_000)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 6e-4 / 2000),
        (999, 3e-4),
        (1999, 6e-4),
        (2000, 6e-4),  # the cosine begins at its top
        (2000 + 99_000, (6e-4 + 6e-5) / 2),  # half-way
        (2000 + 49_500, 6e-5 + 0.5 * (6e-4 - 6e-5) * (1 + math.sqrt(0.5))),  # a quarter
        (200_000, 6e-5),
        (1_000_000, 6e-5),
    ],
)
def test_the_papers_schedule(iteration: int, expected: float) -> None:
    assert learning_rate(PAPER, iteration) == pytest.approx(expected, rel=1e-12)


def test_it_never_leaves_its_bounds_and_only_falls_after_the_warm_up() -> None:
    options = OptimizerOptions(lr=1.0, min_lr=0.1, lr_warmup_iters=5, lr_decay_iters=50)
    rates = [learning_rate(options, i) for i in range(60)]
    assert rates[:5] == sorted(rates[:5]) and rates[4] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert min(rates[5:]) == 0.1 and all(r == 0.1 for r in rates[50:])


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    options = OptimizerOptions(lr=1.0, min_lr=0.0, lr_warmup_iters=0, lr_decay_iters=10)
    assert learning_rate(options, 0) == 1.0


def wsd(shape: str) -> OptimizerOptions:
    return OptimizerOptions(
        lr=1.0,
        min_lr=0.2,
        lr_warmup_iters=10,
        lr_decay_style="WSD",
        lr_decay_iters=100,
        lr_wsd_decay_iters=16,
        lr_wsd_decay_style=shape,
    )


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [
        ("linear", 0.75),
        ("cosine", 0.5 * (1 + math.sqrt(0.5))),
        ("exponential", 2 / 2**0.25 - 1),
        ("minus_sqrt", 0.5),
    ],
)
def test_wsd_is_flat_until_its_decay(shape: str, quarter: float) -> None:
    rates = [learning_rate(wsd(shape), i) for i in range(110)]
    assert rates[9:85] == [1.0] * 76 and rates[4] == 0.5
    assert rates[88] == pytest.approx(0.2 + 0.8 * quarter, rel=1e-12)
    assert rates[84:101] == sorted(set(rates[84:101]), reverse=True)
    assert rates[100:] == [0.2] * 10


def test_linear_and_constant() -> None:
    given = {"lr": 1.0, "min_lr": 0.0, "lr_warmup_iters": 10, "lr_decay_iters": 30}
    linear = OptimizerOptions(**given, lr_decay_style="linear")
    assert [learning_rate(linear, i) for i in (4, 10, 15, 25, 30)] == [0.5, 1.0, 0.75, 0.25, 0.0]
    constant = OptimizerOptions(**given, lr_decay_style="constant")
    assert [learning_rate(constant, i) for i in (4, 10, 29, 30, 9999)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_plateau_is_continued_by_decays_of_any_length(data: list[str], tmp_path: Path) -> None:
    """What WSD is for: one plateau, and decays from its checkpoints that equal whole runs."""
    plateau = ("--lr-warmup-iters", "1", "--lr-decay-style", "constant")
    decay = ("--lr-warmup-iters", "1", "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "2")

    def fn(rank: int) -> tuple[list[float], ...]:
        whole = train(words(data, *decay, iters=5), tmp_path / "whole.jsonl")
        save = ("--save", str(tmp_path / "plateau"))
        train(words(data, *plateau, *save, iters=3), tmp_path / "plateau.jsonl")
        load = ("--load", str(tmp_path / "plateau"))
        rest = train(words(data, *decay, *load, iters=5), tmp_path / "rest.jsonl")
        return tuple(run.column(name) for run in (whole, rest) for name in ("lr", "loss"))

    rates, losses, rates_of_rest, losses_of_rest = run_ranks(1, fn)[0]
    assert rates[:4] == [rates[0]] * 4 and rates[4] < rates[3]
    assert (rates_of_rest, losses_of_rest) == (rates[3:], losses[3:])


def test_the_engine_steps_with_what_is_reported(data: list[str], tmp_path: Path) -> None:
    used: list[float] = []

    def fn(rank: int) -> tuple[list[float], list[float]]:
        def prepare(trainer) -> None:
            optimizer = trainer.engine.ds.optimizer
            step = optimizer.step

            def watched(*args, **kwargs):
                used.append({g["lr"] for g in optimizer.param_groups}.pop())
                return step(*args, **kwargs)

            optimizer.step = watched

        flags = ("--lr", "1e-2", "--min-lr", "1e-3", "--lr-warmup-iters", "2")
        outcome = train(words(data, *flags, iters=5), tmp_path / "m.jsonl", prepare)
        return used, outcome.column("lr")

    used, reported = run_ranks(1, fn)[0]
    assert used == reported
    assert used[:3] == pytest.approx([5e-3, 1e-2, 1e-2]) and used[4] < 4e-3
