"""Token-level uncertainty-aware post-training: learn uncertain tokens, regularize the rest."""

from __future__ import annotations

from typing import ClassVar

import torch

from megatron_eslm.objectives.base import Objective
from megatron_eslm.objectives.loss_tokens import LossTokens
from megatron_eslm.objectives.teacher import Teacher, taught_losses


class Uncertainty(Objective):
    """-log p(label) of kept tokens, KL(teacher || student) of all others.

    Source: "Token-Level Uncertainty-Aware Objective for Language Model Post-Training" (2503.16511):
    masked likelihood on the tokens of highest loss, self-distillation on the rest. Both sums are
    divided by the total number of tokens.
    """

    on_dropped_tokens: ClassVar[bool] = True

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def token_losses(self, tokens: LossTokens) -> torch.Tensor:
        assert tokens.kept_S is not None
        return taught_losses(
            tokens, self.teacher, kl_weight=(~tokens.kept_S).float(), temperature=1.0
        )
