"""Traits of a policy, for code that needs them without a model: config, cost, reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_eslm.selection.selection_options import Scope

Source = Literal["nothing", "policy", "head"]
"""Source of scores: none (no selection at this level), the policy alone (no logits needed), or loss
and entropy from the head."""


@dataclass(frozen=True, kw_only=True)
class PolicyTraits:
    """All that other packages may ask about a policy; `build.policy_traits` derives it."""

    sequence_source: Source
    token_source: Source
    scope: Scope | None
    """--eslm-scope; None if the policy ignores it."""
    early_exit_blocks: int
    """Blocks before sequences are selected; 0 without an early exit (right after the embedding)."""
    proxy_stride: int
    """Distance between the positions that the early exit scores."""
    needs_entropy: bool
    """Whether head statistics must contain the entropy."""
    needs_reference: bool
    """Whether scores need the losses of a reference model."""
    scores_excess: bool
    """Whether scores are losses minus those of a reference model that may be overtaken."""
    needs_gradients: bool
    """Whether it selects by inner products of gradients, each rank among its own sequences."""
    holds_dropped_tokens: bool
    """Whether its objective regularizes dropped tokens towards the starting weights."""
    reads: frozenset[str]
    """Fields of SelectionOptions, besides alpha, that affect the policy."""

    @property
    def selects_sequences(self) -> bool:
        """Whether it drops sequences."""
        return self.sequence_source != "nothing"

    @property
    def selects_tokens(self) -> bool:
        """Whether it drops tokens."""
        return self.token_source != "nothing"

    @property
    def selects_per_step(self) -> bool:
        """Whether sequences are selected once per optimizer step, before it."""
        return self.scope == "step" and self.selects_sequences

    @property
    def selects_in_model(self) -> bool:
        """Whether sequences are selected inside the model, in each micro-step."""
        return self.selects_sequences and not self.selects_per_step

    @property
    def ranks_decide_alone(self) -> bool:
        """Whether each data-parallel rank computes its own thresholds."""
        return self.scope == "local" or self.needs_gradients
