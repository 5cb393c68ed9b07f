"""GREATS: the sequences whose gradients together lower the validation loss most.

Source: Wang et al. (2024), "GREATS: Online Selection of High-Quality Data for LLM Training in Every
Iteration". A step with learning rate eta over chosen sequences S changes the validation loss, to
second order and with the Hessian replaced by the identity, so that adding z gains

    U(z | S) = <g_z, g_val> - eta sum_{z' in S} <g_z, g_z'>        (in units of eta)

and sequences are chosen greedily until the keep rule's number is reached. All tokens of a kept
sequence are trained on. Each data-parallel rank chooses alone among its own sequences: pairs over
ranks would need all of their activations in one place.
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
    """What was chosen, in which order, for what gain."""

    order: list[int]
    """Sequences in the order in which they were chosen."""
    gains: list[float]
    """Gain U when chosen; of the others, the gain if chosen next. EXCLUDED for sequences without
    labels, nan where products are not finite."""


def choose_greedily(
    products: GradientProducts, learning_rate: float, takes_part: list[bool], alpha: float
) -> Choice:
    """The keep rule's number of sequences, each time the one that gains most.

    Ties go to the lower index. A sequence whose products are not finite is chosen first, so that
    the problem surfaces, has gain nan, and leaves the other gains alone.

    Args:
        products: of M sequences.
        learning_rate: eta.
        takes_part: M, false for sequences without any label.
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
    """Keep the sequences that training.gradient_alignment's pass has found to gain most."""

    sequence_source = "policy"
    needs_gradients = True
    reads = frozenset({"greats_valid_share"})
    _choice: Choice | None = None
    """Of the micro-step to come."""

    def choose(self, products: GradientProducts, learning_rate: float, batch: Batch) -> None:
        """Decide on the rows of the micro-step that comes next."""
        takes_part = (batch.num_valid_M > 0).tolist()
        self._choice = choose_greedily(products, learning_rate, takes_part, self.state.alpha)

    def score_sequences(self, scored: ScoredBatch) -> torch.Tensor:
        """Gains, float32 [M]."""
        assert self._choice is not None, "a micro-step began before its sequences were chosen"
        return torch.tensor(self._choice.gains, device=scored.valid_MP.device)

    def keep(self, scores: torch.Tensor, phase: str) -> KeepDecision:
        """What was chosen. Not the highest gains: a gain rises where gradients oppose."""
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
