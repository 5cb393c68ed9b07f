"""Build the policy that `--selection` names."""

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
from megatron_eslm.selection.policy import POLICIES, SelectionPolicy
from megatron_eslm.selection.state import Peers, SelectionState
from megatron_eslm.selection.traits import PolicyTraits


def policy_traits(options: SelectionOptions) -> PolicyTraits:
    """Traits of the policy that `--selection` names.

    Raises:
        ConfigError: the options do not fit the policy.
    """
    return POLICIES[options.selection].traits_of(options)


def build_policy(
    options: SelectionOptions, state: SelectionState, peers: Peers, seed: int
) -> SelectionPolicy:
    """Build the policy that `--selection` names."""
    return POLICIES[options.selection](options, state, peers, seed)
