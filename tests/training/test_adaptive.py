"""ADA-ESLM and the schedule of alpha in training: one course in every layout and over a restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.harness import run_ranks

from .runs import ROWS, Outcome, assert_same_dumps, train, words

ADAPTIVE = (
    *("--eslm-adaptive", "--eslm-adapt-interval", "2", "--eslm-gamma", "3", "--eslm-alpha", "0.3"),
    *("--eslm-start-iter", "1", "--eslm-alpha-warmup-iters", "1", "--eslm-alpha-max", "0.6"),
)
LAYOUTS = {
    "dp2-zero2": (2, 2, ("--zero-stage", "2")),
    "tp2": (2, 1, ("--tensor-model-parallel-size", "2")),
    "pp2dp2": (4, 2, ("--pipeline-model-parallel-size", "2", "--zero-stage", "1")),
}


def argv(data: list[str], dp: int, *flags: str | Path) -> list[str]:
    return words(
        data,
        # Four micro-steps, of which each alpha above 0.125 drops whole ones.
        *("--global-batch-size", 2 * ROWS, "--eslm-scope", "step", *ADAPTIVE, *flags),
        iters=10,
        micro_batch_size=ROWS // 2 // dp,
    )


def test_alpha_moves_alike_in_every_layout(data: list[str], tmp_path: Path) -> None:
    def run(name: str, ranks: int, dp: int, flags: tuple[str, ...]) -> Outcome:
        def fn(rank: int) -> Outcome:
            dump = ("--dump-selection", str(tmp_path / name))
            return train(argv(data, dp, *flags, *dump), tmp_path / f"{name}.jsonl")

        return run_ranks(ranks, fn)[0]

    one = run("one", 1, 1, ())
    alpha = one.column("alpha")
    # Nothing, half, whole; one interval that only records; then the loss falls and alpha rises.
    np.testing.assert_allclose(alpha[:5], [0.0, 0.15, 0.3, 0.3, 0.3])
    assert 0.3 < alpha[6] < alpha[8] <= 0.6
    assert one.column("cvar_delta")[4] is None and one.column("cvar_delta")[6] < 0
    assert one.column("kept_instances")[0] == 1.0 > one.column("kept_instances")[2]
    for name, (ranks, dp, flags) in LAYOUTS.items():
        other = run(name, ranks, dp, flags)
        for column in ("alpha", "cvar", "loss"):
            # No CVaR while nothing is dropped.
            ours, theirs = (np.array(o.column(column), dtype=float) for o in (other, one))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
        assert_same_dumps(tmp_path / name, tmp_path / "one")


def test_the_controller_resumes_exactly(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> list[Outcome]:
        whole = train(argv(data, 2), tmp_path / "whole.jsonl")
        cut = ("--save", str(tmp_path / "cut"))
        first = train(argv(data, 2, *cut, "--exit-interval", "7"), tmp_path / "a.jsonl")
        rest = train(argv(data, 2, *cut, "--load", str(tmp_path / "cut")), tmp_path / "b.jsonl")
        return [whole, first, rest]

    whole, first, rest = run_ranks(2, fn)[0]
    for column in ("alpha", "cvar_delta", "cvar", "loss", "tokens_trained"):
        assert first.column(column) + rest.column(column) == whole.column(column), column
