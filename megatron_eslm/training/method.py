"""Summarize a run's method: what it trains on and what it minimises."""

from __future__ import annotations

from typing import Any

from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.selection_options import SelectionOptions

_LEVELS = {
    (True, True): "both",
    (True, False): "instance",
    (False, True): "token",
    (False, False): None,
}
"""(selects sequences, selects tokens) -> level."""


def selection_summary(options: SelectionOptions) -> dict[str, Any]:
    """Summary of selection; None for options that the policy ignores, whatever their flag says."""
    traits = policy_traits(options)
    return {
        "selection": options.selection,
        "alpha": options.initial_alpha,
        "score": options.eslm_score if "eslm_score" in traits.reads else None,
        "level": _LEVELS[traits.selects_sequences, traits.selects_tokens],
        "proxy_layers": traits.early_exit_blocks or None,
    }


def method_text(selection: SelectionOptions, distill: str | None) -> str:
    """For the log: `eslm of sequences and tokens, alpha 0.1, by loss, early exit after block 1`."""
    found = selection_summary(selection)
    if found["level"] is None:
        words = [f"{found['selection']} (all sequences, all tokens)"]
    else:
        what = {"both": "sequences and tokens", "instance": "sequences", "token": "tokens"}
        words = [f"{found['selection']} of {what[found['level']]}", f"alpha {found['alpha']:g}"]
    if found["score"] is not None:
        words.append(f"by {found['score']}")
    if found["proxy_layers"] is not None:
        words.append(f"early exit after block {found['proxy_layers']}")
    if found["level"] is not None and selection.final_alpha is not None:
        words[1] += f" to {selection.final_alpha:g}"
    if selection.eslm_adaptive:
        words.append("adaptive")
    if distill is not None:
        words.append(f"distillation {distill}")
    return ", ".join(words)
