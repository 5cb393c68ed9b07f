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
from megatron_eslm.selection.policy import POLICIES, SelectionPolicy
from megatron_eslm.selection.state import Peers, SelectionState


def described_policy(options: SelectionOptions) -> SelectionPolicy:
    """The policy that `--selection` names, on one rank at its first alpha: to ask what it does."""
    state = SelectionState(alpha=options.initial_alpha)
    return build_policy(options, state, Peers(0, 1, None), seed=0)


def build_policy(
    options: SelectionOptions, state: SelectionState, peers: Peers, seed: int
) -> SelectionPolicy:
    """The policy that `--selection` names."""
    return POLICIES[options.selection](options, state, peers, seed)
