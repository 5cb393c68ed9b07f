"""Interface of a teacher, as objectives use it.

Shape legend: T positions, M rows, K kept rows, S tokens in the loss, E hidden size of the teacher,
V rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_eslm.objectives.loss_tokens import LossTokens
from megatron_eslm.ops.head.distillation import selective_distillation


class Teacher(Protocol):
    """A frozen model over the student's vocabulary, sharded over the same tensor-parallel ranks."""

    @property
    def weight_VE(self) -> torch.Tensor:
        """This rank's rows of the teacher's head."""

    def hidden(self, tokens_MU: torch.Tensor) -> torch.Tensor:
        """[T, M, E] normalised hidden states for int64 [M, T+1], without gradient."""


def taught_losses(
    tokens: LossTokens, teacher: Teacher, *, kl_weight: float | torch.Tensor, temperature: float
) -> torch.Tensor:
    """float32 [S]: w KL(teacher || student) + (1 - w) (-log p(label)); see `ops.head.distillation`.

    The teacher reads the kept rows; its head computes the tokens in the loss only.
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
