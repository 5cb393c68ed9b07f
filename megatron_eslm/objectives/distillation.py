"""Knowledge distillation: on all tokens, on the kept tokens, or during the first steps only."""

from __future__ import annotations

import torch

from megatron_eslm.objectives.base import Objective
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.objectives.loss_tokens import LossTokens
from megatron_eslm.objectives.teacher import Teacher, taught_losses


class Distillation(Objective):
    """lambda KL(teacher || student) + (1 - lambda) (-log p(label)) (line 7 of Algorithm 3).

    Applies to the tokens that selection keeps. From step `num_iterations` on, if set, uses the
    causal language modelling loss alone (SALT, Rawat et al. 2024).
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        weight: float,
        temperature: float,
        num_iterations: int | None = None,
    ) -> None:
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature
        self.num_iterations = num_iterations
        self._plain = CausalLM()

    def token_losses(self, tokens: LossTokens) -> torch.Tensor:
        if self.num_iterations is not None and tokens.iteration >= self.num_iterations:
            return self._plain.token_losses(tokens)
        return taught_losses(
            tokens, self.teacher, kl_weight=self.weight, temperature=self.temperature
        )
