"""Plain causal language modelling."""

from __future__ import annotations

from megatron_eslm.selection.policy import SelectionPolicy, register


@register("clm")
class CausalLM(SelectionPolicy):
    """Every sequence, every token."""
