"""Values that no option may have, tried on all options."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest

from megatron_eslm.config.flags import Option, options
from megatron_eslm.config.run import GROUPS
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import Range, metadata

OPTIONS = [
    pytest.param(cls, option, id=option.name)
    for cls in GROUPS.values()
    for option in options({"group": cls}).values()
]
NUMBERS = [param for param in OPTIONS if param.values[1].kind in (int, float)]
TEXTS = [param for param in OPTIONS if param.values[1].kind is str]
OWN_CHECK = {"local_rank", "zero_stage"}
"""Numbers that are the launcher's, or one of a few that another check names."""


def refusal(cls: type, option: Option, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        cls(**{option.name: (value,) if option.several else value})
    text = str(caught.value)
    assert text.startswith(f"{option.flag} ") and "\n" not in text
    return text


def range_of(cls: type, option: Option) -> Range | None:
    return metadata(typing.get_type_hints(cls, include_extras=True)[option.name], Range)


@pytest.mark.parametrize(("cls", "option"), NUMBERS)
def test_every_number_has_a_range_and_its_ends_hold(cls: type, option: Option) -> None:
    limits = range_of(cls, option)
    assert (limits is None) == (option.name in OWN_CHECK), "annotate it with a limits.Range"
    if limits is None:
        return
    low = limits.at_least if limits.above is None else limits.above
    high = limits.at_most if limits.below is None else limits.below
    step = 1 if option.kind is int else 1e-3
    outside = [low - step, *([] if limits.above is None else [low])]
    if high is not None:
        outside += [high + step, *([] if limits.below is None else [high])]
    for value in outside:
        refusal(cls, option, value)
    default = next(f.default for f in dataclasses.fields(cls) if f.name == option.name)
    assert default in (None, ()) or limits.refusal(default) is None


@pytest.mark.parametrize(("cls", "option"), NUMBERS)
def test_numbers_are_finite_and_fit_into_64_bits(cls: type, option: Option) -> None:
    """nan passes every comparison that is written the wrong way round."""
    if option.kind is float:
        for value in (math.nan, math.inf, -math.inf):
            assert refusal(cls, option, value) == f"{option.flag} {value} is not a finite number."
    elif option.name not in OWN_CHECK:
        refusal(cls, option, 2**70)
        refusal(cls, option, -(2**70))


@pytest.mark.parametrize(("cls", "option"), TEXTS)
def test_text_is_there_and_can_be_a_path(cls: type, option: Option) -> None:
    """As `--load "$UNSET"` in a script: never the current folder."""
    assert "is empty; give it a value, or leave it out" in refusal(cls, option, "")
    assert "NUL" in refusal(cls, option, "a\0b")


def test_what_a_range_says() -> None:
    assert Range(at_least=1).refusal(0) == "must be 1 or more"
    assert Range(above=0).refusal(0.0) == "must be above 0"
    assert Range(at_least=0, below=1, why="a share").refusal(1) == "is outside [0, 1): a share"
    assert Range(above=0, at_most=1).refusal(1.5) == "is outside (0, 1]"
    assert Range(above=0, at_most=1).refusal(1) is None
