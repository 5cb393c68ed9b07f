"""What an objective is: losses of tokens. Selection and division are done elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from megatron_eslm.objectives.loss_tokens import LossTokens


class Objective(ABC):
    """Losses of the tokens that selection keeps, and of the others where the objective wants them.

    The head divides their sum by the number of these tokens in the *global* micro-step: a mean of
    per-rank means would be wrong as soon as ranks keep different numbers.
    """

    on_dropped_tokens: ClassVar[bool] = False
    """Whether tokens of kept rows that selection drops have a loss of their own."""

    @abstractmethod
    def token_losses(self, tokens: LossTokens) -> torch.Tensor:
        """float32 [S] in nats, with gradients for `normed_SD` and `weight_VD`."""
