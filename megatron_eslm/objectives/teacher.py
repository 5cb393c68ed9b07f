"""What objectives ask of a teacher.

Shape legend: T positions, M rows, K kept rows, S chosen tokens, E hidden of the teacher, V rows of
this rank's shard of the vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_eslm.objectives.loss_tokens import LossTokens
from megatron_eslm.ops.head.distillation import selective_distillation


class Teacher(Protocol):
    """A frozen model over the student's vocabulary, cut over the same tensor-parallel ranks."""

    @property
    def weight_VE(self) -> torch.Tensor:
        """This rank's rows of its head."""

    def hidden(self, tokens_MU: torch.Tensor) -> torch.Tensor:
        """[T, M, E] normalised hidden states for int64 [M, T+1], without gradient."""


def taught_losses(
    tokens: LossTokens, teacher: Teacher, *, kl_weight: float | torch.Tensor, temperature: float
) -> torch.Tensor:
    """float32 [S]: w KL(teacher || student) + (1 - w) (-log p(label)); see `ops`.

    The teacher reads the kept rows; its head sees the chosen tokens only.
    """
    hidden_TKE = teacher.hidden(tokens.batch.tokens_MU[tokens.kept_K])
    return selective_distillation(
        tokens.normed_SD,
        tokens.weight_VD,
        tokens.labels_S,
        tokens.scored_S,
        tokens.statistics,
        hidden_TKE.flatten(0, 1)[tokens.chosen_S],
        teacher.weight_VE,
        tokens.shard,
        kl_weight=kl_weight,
        temperature=temperature,
    )
