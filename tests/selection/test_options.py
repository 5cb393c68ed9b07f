from __future__ import annotations

import dataclasses

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.selection_options import SelectionOptions


@pytest.mark.parametrize("alpha", [1.0, 1.5, -0.1])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"--eslm-alpha \S+ is outside \[0, 1\): .*0.05 to 0.2"):
        SelectionOptions(eslm_alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.999])
def test_alpha_inside_its_range(alpha: float) -> None:
    assert SelectionOptions(eslm_alpha=alpha).eslm_alpha == alpha


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("name", ["eslm_proxy_layers", "eslm_proxy_stride", "max_nonfinite_steps"])
def test_counts_below_one(name: str, value: int) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag} {value} must be 1 or more"):
        SelectionOptions(**{name: value})


def test_defaults_are_the_method_of_the_paper() -> None:
    options = SelectionOptions()
    assert (options.selection, options.eslm_score, options.eslm_level) == ("eslm", "loss", "both")
    assert (options.eslm_scope, options.eslm_proxy_stride) == (None, 1)


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SelectionOptions().eslm_alpha = 0.2  # type: ignore[misc]


def test_every_policy_is_a_choice_and_every_choice_a_policy() -> None:
    from megatron_eslm.config.flags import options
    from megatron_eslm.selection.build import POLICIES

    assert options({"selection": SelectionOptions})["selection"].choices is POLICIES
    assert all(cls.name == name for name, cls in POLICIES.items())
