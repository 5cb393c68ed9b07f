"""One training run, many layouts: ZeRO stages, offload and splits of the global micro-batch.

The contract of docs/design.md, section 4: the same rows and tokens are kept and the same losses
follow, whatever the layout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.harness import run_ranks

from .runs import ROWS, Outcome, assert_same_dumps, build, read_dumps, train, words

STEPS = ("--global-batch-size", 2 * ROWS, "--eslm-scope", "global")  # two micro-steps in all


def single(data: list[str], folder: Path, *flags: str | int) -> Outcome:
    """The run of one process that the others are compared with."""

    def fn(rank: int) -> Outcome:
        argv = words(data, *STEPS, "--dump-selection", folder / "dump1", *flags)
        return train(argv, folder / "one.jsonl")

    return run_ranks(1, fn)[0]


def assert_same_course(ours: Outcome, theirs: Outcome) -> None:
    for name in ("loss", "grad_norm", "tau_instance", "tau_token", "cvar"):
        np.testing.assert_allclose(ours.column(name), theirs.column(name), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(ours.column("loss"), theirs.column("loss"), atol=1e-5)
    np.testing.assert_allclose(ours.valid_losses(), theirs.valid_losses(), atol=1e-5)
    for name in ("kept_instances", "kept_tokens", "tokens", "tokens_trained", "flops"):
        assert ours.column(name) == theirs.column(name), name


def test_zero_stages_follow_one_course(data: list[str], tmp_path: Path) -> None:
    one = single(data, tmp_path, "--eslm-alpha", "0.3")

    def fn(rank: int) -> list[Outcome]:
        return [
            train(
                words(
                    data,
                    *(*STEPS, "--eslm-alpha", "0.3", "--zero-stage", stage),
                    *("--dump-selection", tmp_path / f"dump-zero{stage}"),
                    micro_batch_size=ROWS // 2,
                ),
                tmp_path / f"zero{stage}.jsonl",
            )
            for stage in range(4)
        ]

    for stage, outcome in enumerate(run_ranks(2, fn)[0]):
        assert_same_course(outcome, one)
        assert_same_dumps(tmp_path / f"dump-zero{stage}", tmp_path / "dump1")
    assert one.column("loss")[-1] < one.column("loss")[0] - 0.5


@pytest.mark.slow  # the first use compiles for about a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="offload compiles DeepSpeed's CPU Adam")
def test_cpu_offload_follows_the_same_course(data: list[str], tmp_path: Path) -> None:
    one = single(data, tmp_path)

    def fn(rank: int) -> list[Outcome]:
        return [
            train(
                words(
                    data,
                    *(*STEPS, "--zero-stage", stage, "--cpu-offload"),
                    *("--dump-selection", tmp_path / f"dump-offload{stage}"),
                    micro_batch_size=ROWS // 2,
                ),
                tmp_path / f"offload{stage}.jsonl",
            )
            for stage in (1, 2, 3)
        ]

    for stage, outcome in zip((1, 2, 3), run_ranks(2, fn, timeout=300)[0], strict=True):
        assert_same_course(outcome, one)
        assert_same_dumps(tmp_path / f"dump-offload{stage}", tmp_path / "dump1")


POLICIES = {
    "loss": ("--eslm-alpha", "0.3"),
    "entropy": ("--eslm-alpha", "0.3", "--eslm-score", "entropy"),
    "random": ("--eslm-alpha", "0.3", "--selection", "random"),
    "clm": ("--selection", "clm"),
}


def all_policies(data: list[str], folder: Path, world: int) -> dict[str, Outcome]:
    """Every policy, one after another, on `world` ranks."""

    def fn(rank: int) -> dict[str, Outcome]:
        return {
            name: train(
                words(
                    data,
                    *(*STEPS, *flags, "--dump-selection", folder / f"{name}{world}"),
                    micro_batch_size=ROWS // world,
                ),
                folder / f"{name}{world}.jsonl",
            )
            for name, flags in POLICIES.items()
        }

    return run_ranks(world, fn)[0]


def test_every_split_of_the_batch_selects_the_same(data: list[str], tmp_path: Path) -> None:
    one = all_policies(data, tmp_path, 1)
    for world in (2, 4):
        other = all_policies(data, tmp_path, world)
        for name in POLICIES:
            for column in ("loss", "grad_norm"):
                np.testing.assert_allclose(
                    other[name].column(column), one[name].column(column), rtol=1e-4, atol=1e-5
                )
            assert other[name].column("tokens_trained") == one[name].column("tokens_trained")
            np.testing.assert_allclose(
                other[name].valid_losses(), one[name].valid_losses(), atol=1e-5
            )
            assert_same_dumps(tmp_path / f"{name}{world}", tmp_path / f"{name}1")
    kept = {
        name: np.stack([d["token_kept"] for d in read_dumps(tmp_path / f"{name}1").values()])
        for name in POLICIES
    }
    assert kept["clm"].all()
    assert not (kept["loss"] == kept["random"]).all()
    assert not (kept["loss"] == kept["entropy"]).all()


SPLIT_MODELS = {
    "random": POLICIES["random"],
    "noisy clm": ("--selection", "clm", "--label-noise", "0.2"),
    "noisy eslm": ("--eslm-alpha", "0.3", "--label-noise", "0.2"),
}


def test_the_controls_and_label_noise_where_the_model_is_split(
    data: list[str], tmp_path: Path
) -> None:
    """Beside what the parity matrix has: draws and noisy labels on every rank that needs them."""
    layouts = {
        "one": (),
        "tp2": ("--tensor-model-parallel-size", "2"),
        "pp2": ("--pipeline-model-parallel-size", "2"),
    }

    def run(name: str, layout: str) -> Outcome:
        place = tmp_path / f"{name}-{layout}".replace(" ", "_")
        flags = (*SPLIT_MODELS[name], *layouts[layout], "--dump-selection", place)
        steps = ("--global-batch-size", 2 * ROWS, "--eslm-scope", "step")
        argv = words(data, *steps, *flags, micro_batch_size=4)
        return train(argv, place.with_suffix(".jsonl"))

    def fn(rank: int, some: tuple[str, ...]) -> dict[tuple[str, str], Outcome]:
        return {(name, layout): run(name, layout) for name in SPLIT_MODELS for layout in some}

    one = run_ranks(1, fn, ("one",))[0]
    for (name, layout), outcome in run_ranks(2, fn, ("tp2", "pp2"))[0].items():
        for column in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                outcome.column(column),
                one[name, "one"].column(column),
                rtol=1e-4,
                atol=1e-5,
                err_msg=f"{name} {layout}",
            )
        ours, theirs = (f"{name}-{where}".replace(" ", "_") for where in (layout, "one"))
        assert_same_dumps(tmp_path / ours, tmp_path / theirs)


def test_local_scope_thresholds_each_rank_alone(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> Outcome:
        argv = words(
            data,
            *("--eslm-scope", "local", "--eslm-alpha", "0.3"),
            *("--dump-selection", tmp_path / "dump"),
            micro_batch_size=ROWS // 2,
        )
        return train(argv, tmp_path / "local.jsonl")

    outcome = run_ranks(2, fn)[0]
    for dump in read_dumps(tmp_path / "dump").values():
        # floor(0.7 x 4) = 2 rows and floor(0.7 x 64) = 44 tokens on each of the ranks
        assert dump["instance_kept"].reshape(2, 4).sum(1).tolist() == [2, 2]
        assert dump["token_kept"].reshape(2, -1).sum(1).tolist() == [44, 44]
    assert outcome.column("kept_instances") == [0.5] * 4


def test_alpha_zero_is_causal_language_modelling_bit_for_bit(
    data: list[str], tmp_path: Path
) -> None:
    runs = {
        "clm": ("--selection", "clm"),
        "eslm": ("--eslm-alpha", "0"),
        "entropy": ("--eslm-alpha", "0", "--eslm-score", "entropy"),
        "random": ("--eslm-alpha", "0", "--selection", "random"),
    }

    def fn(rank: int) -> dict[str, Outcome]:
        return {
            name: train(words(data, *STEPS, *flags, iters=5), tmp_path / f"{name}.jsonl")
            for name, flags in runs.items()
        }

    outcomes = run_ranks(1, fn)[0]
    for name in runs:
        for column in ("loss", "grad_norm", "tokens", "tokens_trained"):
            assert outcomes[name].column(column) == outcomes["clm"].column(column), (name, column)
        assert outcomes[name].valid_losses() == outcomes["clm"].valid_losses()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_learns_in_every_stage(data: list[str], tmp_path: Path, stage: int) -> None:
    def fn(rank: int) -> tuple[Outcome, str]:
        argv = words(
            data, *STEPS, "--bf16", "--zero-stage", stage, iters=8, micro_batch_size=ROWS // 2
        )
        seen = []
        outcome = train(argv, tmp_path / "bf16.jsonl", lambda t: seen.append(t))
        return outcome, str(next(seen[0].engine.ds.module.parameters()).dtype)

    outcome, dtype = run_ranks(2, fn)[0]
    assert dtype == "torch.bfloat16"
    assert outcome.column("loss")[-1] < outcome.column("loss")[0] - 0.5
    assert outcome.valid_losses()[-1] < outcome.valid_losses()[0] - 0.5
    assert outcome.column("nonfinite_steps")[-1] == 0
    assert all(norm > 0 for norm in outcome.column("grad_norm"))


def test_weights_start_and_decay_alike(data: list[str]) -> None:
    """Matrices decay, biases and norms do not; what a user sets reaches the optimizer."""

    def fn(rank: int) -> list[tuple]:
        trainer = build(words(data, "--weight-decay", "0.3", "--adam-beta1", "0.8"))
        optimizer = trainer.engine.ds.optimizer
        return [
            (g["weight_decay"], g["betas"], {p.dim() for p in g["params"]})
            for g in optimizer.param_groups
        ]

    assert run_ranks(1, fn)[0] == [(0.3, (0.8, 0.95), {2}), (0.0, (0.8, 0.95), {1})]


def test_a_rank_without_rows_recomputes_as_the_others(data: list[str], tmp_path: Path) -> None:
    """ZeRO 3 gathers weights in the recomputation, so ranks must recompute the same layers."""
    flags = (
        *("--eslm-alpha", "0.75", "--eslm-scope", "global", "--activation-checkpoint-interval", 1),
        *("--hidden-dropout", "0.1", "--global-batch-size", 8, "--attention-dropout", "0.1"),
    )

    def fn(rank: int, ranks: int) -> Outcome:
        zero = ("--zero-stage", 3 if ranks > 1 else 0, "--dump-selection", tmp_path / str(ranks))
        argv = words(data, *flags, *zero, micro_batch_size=4 // ranks, iters=3)
        return train(argv, tmp_path / f"{ranks}.jsonl")

    one, two = run_ranks(1, fn, 1)[0], run_ranks(2, fn, 2)[0]
    kept = [dump["instance_kept"] for dump in read_dumps(tmp_path / "2").values()]
    halves = np.concatenate([part.reshape(-1, 2) for part in kept])
    assert not halves.any(axis=1).all()  # a rank keeps none of its two rows
    np.testing.assert_allclose(two.column("loss"), one.column("loss"), atol=1e-5)
