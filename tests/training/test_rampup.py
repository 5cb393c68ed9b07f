"""A batch that grows: the same run in every layout, exact across a resume in the middle of it."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.checkpoint.weights import read_weights
from megatron_eslm.config.run import parse_run
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.selection.state import SelectionState
from megatron_eslm.training.dry_run import dry_run
from megatron_eslm.training.reading_plan import plan_reading
from tests.harness import run_ranks

from .runs import ROWS, Outcome, assert_same_dumps, refusal, train, words

RAMP = ("--global-batch-size", 3 * ROWS, "--rampup-batch-size", ROWS, ROWS, 6 * ROWS)
SIZES = [ROWS, ROWS, ROWS, 2 * ROWS, 2 * ROWS, 3 * ROWS]
"""Of the steps: the batch grows after 3 and 6 times ROWS samples."""
PP2 = ("--pipeline-model-parallel-size", "2")
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    # ranks, data-parallel ranks, flags
    "one": (1, 1, ()),
    "zero2": (2, 2, ("--zero-stage", "2")),
    "zero3": (2, 2, ("--zero-stage", "3")),
    "pp2": (2, 1, PP2),
    "pp2-zero1": (2, 1, (*PP2, "--zero-stage", "1")),
    "tp2": (2, 1, ("--tensor-model-parallel-size", "2", "--zero-stage", "1")),
}


def ramped(data: list[str], folder: Path, case: str, save: str, *more: object) -> Outcome:
    _, dp, flags = CASES[case]
    argv = words(
        data,
        *(*RAMP, *flags, "--eslm-alpha", "0.3", "--dump-selection", folder / f"dump-{save}"),
        *("--save", folder / save, *more),
        iters=len(SIZES),
        micro_batch_size=ROWS // dp,
    )
    return train(argv, folder / f"{save}.jsonl")


def assert_follows(outcome: Outcome, other: Outcome, name: str) -> None:
    for column in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            outcome.column(column), other.column(column), rtol=2e-5, atol=1e-5, err_msg=name
        )
    assert outcome.column("batch_size") == SIZES, name


def test_every_layout_follows_and_a_resume_inside_the_ramp_is_exact(
    data: list[str], tmp_path: Path
) -> None:
    def fn(rank: int, ranks: int) -> dict[str, list[Outcome]]:
        outcomes = {}
        for case in CASES:
            if CASES[case][0] != ranks:
                continue
            outcomes[case] = [ramped(data, tmp_path, case, case)]
            if case in ("zero2", "pp2"):
                # After a step of two micro-steps per rank, with another such step to come.
                save = f"{case}-halves"
                ramped(data, tmp_path, case, save, "--exit-interval", 4)
                load = ("--load", tmp_path / save)
                outcomes[case].append(ramped(data, tmp_path, case, save, *load))
        return outcomes

    outcomes = {k: v for ranks in (1, 2) for k, v in run_ranks(ranks, fn, ranks)[0].items()}
    (one,) = outcomes["one"]
    assert one.column("consumed_samples") == list(accumulate(SIZES))
    assert one.column("tokens") == [32 * samples for samples in accumulate(SIZES)]
    for case, (straight, *resumed) in outcomes.items():
        assert_follows(straight, one, case)
        assert_same_dumps(tmp_path / f"dump-{case}", tmp_path / "dump-one")
        for outcome in resumed:
            for column in ("loss", "grad_norm", "tau_token", "batch_size", "consumed_samples"):
                assert outcome.column(column) == straight.column(column), (case, column)
            ours, theirs = (read_weights(tmp_path / n).weights for n in (case, f"{case}-halves"))
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), case


def test_a_ramp_is_runs_of_constant_batches_one_after_the_other(
    data: list[str], tmp_path: Path
) -> None:
    """And so its steps are normalised as theirs are: the batch grows with consent, too."""
    flags = ("--selection", "clm", "--lr-decay-iters", len(SIZES), "--lr-warmup-iters", 1)

    def fn(rank: int) -> tuple[Outcome, Outcome]:
        straight = train(words(data, *flags, *RAMP, iters=6), tmp_path / "straight.jsonl")
        folder = ("--save", tmp_path / "run", "--load", tmp_path / "run", "--allow-data-change")
        for iters, size in ((3, ROWS), (5, 2 * ROWS), (6, 3 * ROWS)):
            argv = words(data, *flags, *folder, "--global-batch-size", size, iters=iters)
            parts = train(argv, tmp_path / "parts.jsonl")
        # The same batches in twice as many micro-steps.
        halves = words(data, *flags, *RAMP, iters=6, micro_batch_size=ROWS // 2)
        return straight, parts, train(halves, tmp_path / "halves.jsonl")

    straight, parts, halves = run_ranks(1, fn)[0]
    for column in ("loss", "grad_norm", "lr", "batch_size", "consumed_samples"):
        assert parts.column(column) == straight.column(column)
    assert_follows(halves, straight, "halves")


def test_a_dry_run_knows_what_is_read_and_computed(data: list[str], tmp_path: Path) -> None:
    """Of the whole run, also from the middle of it: a ramp, a warm-up of alpha, a gap."""
    flags = ("--eslm-alpha", "0.3", "--eslm-alpha-warmup-iters", "4", "--skip-samples", "20:50")

    def fn(rank: int) -> tuple[list[str], Outcome]:
        folder = ("--save", tmp_path / "run", "--load", tmp_path / "run")
        argv = words(data, *RAMP, *flags, *folder, iters=6)
        init_distributed()
        texts = [dry_run(parse_run([*argv, "--dry-run"], 1))[0]]
        train([*argv, "--exit-interval", "3"], tmp_path / "m.jsonl")
        texts.append(dry_run(parse_run([*argv, "--dry-run"], 1))[0])
        return texts, train(argv, tmp_path / "m.jsonl")

    texts, outcome = run_ranks(1, fn)[0]
    # The samples that are passed over count: the third step ends at 54, behind the ramp.
    assert outcome.column("batch_size") == [8, 8, 8, 24, 24, 24]
    last = outcome.steps[-1]
    for text in texts:
        assert f"tokens read          {last['tokens']:,}\n" in text
        assert f"tokens trained on    {last['tokens_trained']:,} (" in text
        assert f"FLOPs executed       {last['flops']:.3e}" in text
        assert f"FLOPs by the paper   {last['flops_paper']:.3e}" in text
        assert "ramp                 from 8 sequences in increments of 8 over 48 samples" in text
        assert "skipped              30 samples (20:50)" in text
    assert "reading continues" not in texts[0]
    assert "6 (3 of them done)" in texts[1] and "reading continues    with sample 54\n" in texts[1]


def test_a_ramp_that_ends_too_late_is_said(
    data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    init = TrainState(SelectionState(alpha=0.0), run_id="0" * 32)
    for iters, said in ((6, False), (5, True)):
        caplog.clear()
        plan = plan_reading(parse_run(words(data, *RAMP, iters=iters), 1), init, [])
        assert plan.end == sum(SIZES[:iters])
        text = f"--train-iters {iters} ends before the ramp of --rampup-batch-size:"
        assert (text in caplog.text) == said


def test_a_ramp_that_is_changed_needs_consent(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> str:
        train(words(data, *RAMP, "--save", tmp_path / "run", iters=2))
        load = ("--load", tmp_path / "run", "--global-batch-size", 3 * ROWS)
        return refusal(words(data, *load, iters=6))

    (text,) = run_ranks(1, fn)
    assert "rampup_batch_size: [8, 8, 48] there, None here" in text
    assert "--allow-data-change" in text
