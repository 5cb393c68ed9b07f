from __future__ import annotations

import pytest

from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.objectives.objective_options import ObjectiveOptions


def resolved(flags: str) -> RunConfig:
    return parse_run(f"--data-path x --model-size 124M {flags}".split(), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distill_weight": 1.1}, r"--distill-weight 1.1 is outside \[0, 1\]"),
        ({"distill_temperature": 0.0}, "--distill-temperature 0 must be above 0"),
        ({"salt_iters": 0}, "--salt-iters 0 must be 1 or more"),
    ],
)
def test_values_that_mean_nothing(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectiveOptions(**values)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_paper() -> None:
    options = resolved("--distill eslm --distill-teacher t").objective
    assert (options.distill_weight, options.distill_temperature) == (0.5, 1.0)
    assert options.salt_iters == 12_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--distill eslm", "--distill eslm needs a teacher, but --distill-teacher is not set"),
        (
            "--distill dense --distill-teacher t",
            "--distill dense trains on all tokens, but --selection is eslm; use --selection clm, "
            "or --distill eslm",
        ),
        (
            "--distill salt --distill-teacher t --selection random",
            "--distill salt trains on all tokens, but --selection is random; use --selection clm.",
        ),
        (
            "--distill eslm --distill-teacher t --selection clm",
            "trains on the tokens that ESLM keeps, but --selection is clm; use --selection eslm.",
        ),
        (
            "--distill dense --distill-teacher t --selection uncertainty --load l",
            "--distill dense trains on all tokens, but --selection is uncertainty",
        ),
        ("--distill-teacher t", "--distill-teacher has no effect without --distill dense"),
        ("--distill-weight 0.1", "--distill-weight has no effect without --distill dense"),
        (
            "--distill eslm --distill-teacher t --salt-iters 3",
            "--salt-iters has no effect without --distill salt",
        ),
        (
            "--selection uncertainty --load l --distill-temperature 2",
            "--distill-temperature has no effect without --distill",
        ),
        ("--selection uncertainty", "--selection uncertainty regularizes a trained model .* needs"),
        (
            "--selection uncertainty --load l --eslm-level instance",
            "--eslm-level instance leaves --selection uncertainty nothing to",
        ),
        (
            "--selection uncertainty --load l --eslm-score entropy",
            "--eslm-score entropy has no meaning with --selection uncertainty",
        ),
        (
            "--selection uncertainty --load l --uncertainty-quantile 0",
            r"--uncertainty-quantile 0 is outside \(0, 1\]",
        ),
    ],
)
def test_pairs_that_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(flags)


def test_what_uncertainty_drops_is_what_it_does_not_learn() -> None:
    run = resolved("--selection uncertainty --load l --uncertainty-quantile 0.4")
    assert run.selection.initial_alpha == pytest.approx(0.6)
    assert (
        resolved("--selection uncertainty --load l --distill-teacher t").objective.distill is None
    )
