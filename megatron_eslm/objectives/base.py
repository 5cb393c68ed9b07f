"""Base class of objectives: losses per token. Selection and normalisation happen elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from megatron_eslm.objectives.loss_tokens import LossTokens


class Objective(ABC):
    """Computes losses of kept tokens, and of dropped ones if the objective uses them.

    The head divides their sum by the number of these tokens in the *global* micro-step: a mean of
    per-rank means would be wrong as soon as ranks keep different numbers.
    """

    on_dropped_tokens: ClassVar[bool] = False
    """Whether dropped tokens of kept rows also enter the loss."""

    @abstractmethod
    def token_losses(self, tokens: LossTokens) -> torch.Tensor:
        """Losses per token, float32 [S] in nats, with gradients for `normed_SD` and `weight_VD`."""
