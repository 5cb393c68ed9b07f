"""What a policy does, for whoever decides before there is a model: config, cost, reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_eslm.selection.options import Scope

Source = Literal["nothing", "policy", "head"]
"""Where scores come from: no selection at this level, the policy alone (no logits needed), or loss
and entropy of the head."""


@dataclass(frozen=True, kw_only=True)
class PolicyTraits:
    """All that other packages may ask of a policy; `build.policy_traits` makes it of options."""

    sequence_source: Source
    token_source: Source
    scope: Scope | None
    """--eslm-scope, where the policy looks at it."""
    early_exit_blocks: int
    """Blocks before sequences are selected; 0 without an early exit: right after the embedding."""
    proxy_stride: int
    """The early exit scores every so-manyth position."""
    needs_entropy: bool
    """Whether head statistics must contain the entropy."""
    needs_reference: bool
    """Whether scores need the losses of a reference model."""
    needs_gradients: bool
    """Whether it chooses by inner products of gradients, each rank among its own sequences."""
    holds_dropped_tokens: bool
    """Whether its objective holds tokens that are not kept to the weights that training started
    from."""
    reads: frozenset[str]
    """Fields of SelectionOptions that change what it does, besides alpha's."""

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
        """Whether sequences are selected once an optimizer step, ahead of it."""
        return self.scope == "step" and self.selects_sequences

    @property
    def selects_in_model(self) -> bool:
        """Whether sequences are selected within each micro-step, in mid-model."""
        return self.selects_sequences and not self.selects_per_step

    @property
    def ranks_decide_alone(self) -> bool:
        """Whether each data-parallel rank takes its own thresholds."""
        return self.scope == "local" or self.needs_gradients
