"""GREATS: keep the sequences whose gradients together lower the validation loss most.

Source: Wang et al. (2024), "GREATS: Online Selection of High-Quality Data for LLM Training in Every
Iteration". For a step with learning rate eta over the selected sequences S, expand the validation
loss to second order and replace the Hessian by the identity. Adding z to S then gains

    U(z | S) = <g_z, g_val> - eta sum_{z' in S} <g_z, g_z'>        (in units of eta)

Sequences are selected greedily up to the keep rule's number. All tokens of a kept sequence are
trained on. Each data-parallel rank selects among its own sequences only: pairs across ranks would
need the activations of all ranks in one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.ops.ghost_products import GradientProducts
from megatron_eslm.ops.keep_rule import EXCLUDED, KeepDecision, num_to_keep
from megatron_eslm.selection.policy import SelectionPolicy, register
from megatron_eslm.selection.scored import ScoredBatch


@dataclass(frozen=True)
class Choice:
    """The selected sequences, in order, and the gains of all."""

    order: list[int]
    """Sequences in the order of selection."""
    gains: list[float]
    """Gain U when selected; for the rest, the gain if selected next. EXCLUDED for sequences without
    labels, nan where products are not finite."""


def choose_greedily(
    products: GradientProducts, learning_rate: float, takes_part: list[bool], alpha: float
) -> Choice:
    """Select the keep rule's number of sequences, each time the one with the highest gain.

    Ties go to the lower index. Sequences with non-finite products are selected first so the problem
    surfaces; their gain is nan, and they do not affect other gains.

    Args:
        products: gradient products of M sequences.
        learning_rate: eta.
        takes_part: length M, false for sequences without any label.
        alpha: share to drop.
    """
    gains = products.validation_M.tolist()
    pairs = products.pairs_MM.tolist()
    candidates = [m for m, part in enumerate(takes_part) if part]
    finite = [m for m in candidates if math.isfinite(gains[m]) and math.isfinite(pairs[m][m])]
    order = sorted(set(candidates) - set(finite))
    for m in range(len(gains)):
        if m not in finite:
            gains[m] = math.nan if takes_part[m] else EXCLUDED
    for _ in range(num_to_keep(len(candidates), alpha) - len(order)):
        best = max(finite, key=lambda m: gains[m])
        order.append(best)
        finite.remove(best)
        for m in finite:
            gains[m] -= learning_rate * pairs[m][best]
    return Choice(order, gains)


@register("greats")
class Greats(SelectionPolicy):
    """Keep the sequences that `choose_greedily` selects from `training.gradient_alignment`."""

    sequence_source = "policy"
    needs_gradients = True
    reads = frozenset({"greats_valid_share"})
    _choice: Choice | None = None
    """The choice for the next micro-step."""

    def choose(self, products: GradientProducts, learning_rate: float, batch: Batch) -> None:
        """Decide on the rows of the micro-step that comes next."""
        takes_part = (batch.num_valid_M > 0).tolist()
        self._choice = choose_greedily(products, learning_rate, takes_part, self.state.alpha)

    def score_sequences(self, scored: ScoredBatch) -> torch.Tensor:
        """Gains, float32 [M]."""
        assert self._choice is not None, "a micro-step began before its sequences were chosen"
        return torch.tensor(self._choice.gains, device=scored.valid_MP.device)

    def keep(self, scores: torch.Tensor, phase: str) -> KeepDecision:
        """The rows selected by `choose`, not the highest final gains.

        Greedy updates raise the gain of sequences whose gradients oppose the selected ones.
        """
        assert self._choice is not None
        choice, self._choice = self._choice, None
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[choice.order] = True
        finite = [choice.gains[m] for m in choice.order if math.isfinite(choice.gains[m])]
        numbers = (
            min(finite, default=math.nan),
            math.nan,
            sum(gain != EXCLUDED for gain in choice.gains),
            len(choice.order),
            sum(math.isnan(gain) for gain in choice.gains),
        )
        return KeepDecision(keep, torch.tensor(numbers, dtype=torch.float64, device=scores.device))
