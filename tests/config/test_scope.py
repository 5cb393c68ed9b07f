"""--eslm-scope: what it is where it was not given, and where it cannot be or saves nothing."""

from __future__ import annotations

import logging

import pytest

from megatron_eslm.config.run import RunConfig, parse_flags, parse_run, resolve
from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.selection_options import Scope
from tests.argv import later_wins

SHAPE = "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 16"
SMALL = f"--data-path x {SHAPE} --lr 0.1 --train-iters 9 --micro-batch-size 2".split(" ")


def scope(flags: str, world: int = 1, stored: Scope | None = None) -> str | None:
    parsed = parse_flags(later_wins([*SMALL, *flags.split()]))
    return resolve(world_size=world, stored_scope=stored, **parsed).selection.eslm_scope


@pytest.mark.parametrize(
    ("flags", "world", "expected"),
    [
        ("--global-batch-size 10", 1, "global"),
        ("--global-batch-size 20", 1, "step"),
        ("--global-batch-size 40", 2, "step"),
        ("--global-batch-size 20 --pipeline-model-parallel-size 2", 2, "step"),
        ("--global-batch-size 20 --tensor-model-parallel-size 2", 2, "step"),
        ("--global-batch-size 20 --eslm-scope step", 1, "step"),
        ("--global-batch-size 40 --eslm-scope local", 2, "local"),
        ("--global-batch-size 40 --selection random", 2, "step"),
        # Nothing is selected among sequences: no step to select in, and nothing to refuse.
        ("--global-batch-size 4 --selection clm", 2, None),
        ("--global-batch-size 4 --eslm-level token --eslm-scope step", 2, "step"),
        ("--global-batch-size 4 --eslm-level token --pipeline-model-parallel-size 2", 2, None),
        ("--global-batch-size 4 --selection greats", 2, None),
        ("--global-batch-size 40 --eslm-alpha 0", 2, None),
        # 6 micro-steps would drop 16.7 % at 0.1.
        ("--global-batch-size 12", 1, "global"),
        ("--global-batch-size 16", 1, "step"),
    ],
)
def test_what_it_is(flags: str, world: int, expected: str | None) -> None:
    assert scope(flags, world) == expected


def test_a_share_far_from_alpha_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scope("--global-batch-size 20 --eslm-scope step")
        assert not caplog.messages
        scope("--global-batch-size 4 --eslm-scope step --eslm-alpha 0.3")
    (said,) = caplog.messages
    assert "drops 50.0 % of the sequences where --eslm-alpha is 0.3" in said


def test_a_tiny_alpha_takes_no_time() -> None:
    with pytest.raises(ConfigError, match="have 500000001 micro-steps"):
        scope("--global-batch-size 20 --eslm-scope step --eslm-alpha 1e-9")


def test_a_pipeline_goes_on_with_a_run_of_another_scope(caplog: pytest.LogCaptureFixture) -> None:
    pp = "--global-batch-size 20 --pipeline-model-parallel-size 2"
    with caplog.at_level(logging.WARNING):
        assert scope(pp, 2, stored="global") == "step"
    assert "the run was begun with global" in caplog.text


def test_a_run_goes_on_with_the_scope_that_it_had() -> None:
    assert scope("--global-batch-size 40", 2, stored="global") == "global"
    assert scope("--global-batch-size 20", 1, stored="step") == "step"
    assert scope("--global-batch-size 20 --eslm-scope local", 1, stored="step") == "local"


def test_by_default_a_step_without_a_whole_micro_step_to_drop_selects_within(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert scope("--global-batch-size 20", 2) == "global"
        for part in ("--eslm-scope global", ": 5 micro-steps", "Have 8 micro-steps"):
            assert part in caplog.text
        assert "or give --eslm-scope step" not in caplog.text
        assert scope("--global-batch-size 32 --micro-batch-size 8", 2) == "global"
        assert "or give --eslm-scope step, which drops 12.5% here" in caplog.text


def test_batches_of_a_ramp_that_are_trained_on_whole_are_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ramp = "--global-batch-size 40 --rampup-batch-size 4 4 100"
    with caplog.at_level(logging.WARNING):
        scope(f"{ramp} --selection clm")
        scope(f"{ramp} --eslm-scope local")
        assert not caplog.messages
        assert scope(ramp) == "step"
    # 4 micro-steps of 2.
    assert "batches of up to 8 sequences are trained on in full" in caplog.text


def test_rows_are_dropped_where_micro_steps_are_too_few() -> None:
    assert scope("--global-batch-size 32 --micro-batch-size 8 --eslm-scope step", 2) == "step"
    pp = "--global-batch-size 16 --micro-batch-size 8 --pipeline-model-parallel-size 2"
    assert scope(pp, 2) == "step"


@pytest.mark.parametrize(
    ("flags", "world", "parts"),
    [
        (
            "--global-batch-size 20 --eslm-scope step",
            2,
            ["--eslm-alpha 0.1 of 5 micro-step(s) of 2 row(s) rounds to none", "above 0.1",
             "6 micro-steps", "--eslm-scope global"],
        ),
        ("--global-batch-size 2 --eslm-scope step", 1, ["of 1 micro-step(s)", "above 0.25"]),
        (
            "--global-batch-size 8 --pipeline-model-parallel-size 2",
            2,
            ["--eslm-scope step", "of 4 ", "above 0.125"],
        ),
        (
            "--global-batch-size 40 --pipeline-model-parallel-size 2 --eslm-scope global",
            2,
            ["--eslm-scope global", "--pipeline-model-parallel-size 2", "Use --eslm-scope step"],
        ),
        (
            "--global-batch-size 40 --pipeline-model-parallel-size 2 --eslm-scope local",
            2,
            ["--eslm-scope local", "inside the model"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(flags: str, world: int, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        scope(flags, world)
    for part in parts:
        assert part in str(error.value)
    if "--pipeline" in flags:
        assert "use --eslm-scope global" not in str(error.value)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 7, 9, 10, 40, 100])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_the_remedies_that_are_named_help(steps: int, alpha: float) -> None:
    def run(alpha: float, steps: int) -> RunConfig:
        more = f"--global-batch-size {2 * steps} --eslm-alpha {alpha} --eslm-scope step"
        return parse_run([*SMALL, *more.split()], 1)

    try:
        run(alpha, steps)
    except ConfigError as error:
        words = str(error).split()
        run(float(words[words.index("above") + 1].rstrip(",")) + 0.005, steps)
        run(alpha, int(words[words.index("have") + 1]))
