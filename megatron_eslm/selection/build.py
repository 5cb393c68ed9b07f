"""The policies by name, and how one is built."""

from __future__ import annotations

from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.policies import (  # noqa: F401  (each registers itself)
    clm,
    eslm,
    greats,
    random_control,
    rho1,
    uncertainty,
)
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.registry import POLICIES
from megatron_eslm.selection.state import Peers, SelectionState
from megatron_eslm.selection.traits import PolicyTraits


def policy_traits(options: SelectionOptions) -> PolicyTraits:
    """What the policy that `--selection` names does.

    Raises:
        ConfigError: the options do not fit the policy.
    """
    return POLICIES[options.selection].traits_of(options)


def build_policy(
    options: SelectionOptions, state: SelectionState, peers: Peers, seed: int
) -> SelectionPolicy:
    """The policy that `--selection` names."""
    return POLICIES[options.selection](options, state, peers, seed)
