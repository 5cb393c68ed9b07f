"""Build the policy that `--selection` names."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_eslm.selection import policies
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.registry import POLICIES
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, SelectionState
from megatron_eslm.selection.traits import PolicyTraits

for _module in pkgutil.iter_modules(policies.__path__):
    importlib.import_module(f"{policies.__name__}.{_module.name}")  # it registers its policy


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
