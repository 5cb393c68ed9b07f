"""What selection carries along: where in training it is, and what it saw in this micro-step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class SelectionState:
    """The part of a run's state that policies read and a controller may move; checkpointed."""

    alpha: float
    """Share to drop now; 0 where nothing is selected."""
    iteration: int = 0
    """Optimizer step under way, from 0."""
    micro_step: int = 0
    """Micro-step of it under way, from 0."""


@dataclass(frozen=True)
class Peers:
    """The data-parallel ranks that look at one global micro-batch together."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    """None on a single rank."""


@dataclass
class MicroStepRecord:
    """What one micro-step selected on this rank.

    M rows of this rank, T positions. Counts are local; thresholds are those of the group that was
    thresholded together. Scores are nan where nothing was scored.
    """

    instance_scores_M: torch.Tensor | None = None
    instance_kept_M: torch.Tensor | None = None
    tau_instance: float | None = None
    token_scores_MT: torch.Tensor | None = None
    token_kept_MT: torch.Tensor | None = None
    tau_token: float | None = None
    cvar: float | None = None
    num_rows: int = 0
    num_rows_kept: int = 0
    num_tokens: int = 0
    """Valid tokens that were read."""
    num_tokens_in_kept_rows: int = 0
    """Valid tokens of kept rows."""
    num_tokens_scored: int = 0
    """Tokens whose logits the head computed."""
    num_tokens_kept: int = 0
    """Tokens in the loss."""
    num_nonfinite: int = 0
    """Scores that are not finite, over the ranks that were thresholded together."""
    nonfinite_rows_M: torch.Tensor | None = None
    """bool; local rows that hold one."""


@dataclass
class Recorder:
    """Where the layers that select leave what they did, for the loop to take up.

    The record cannot travel with the activations: in a pipeline instance and token selection
    happen in different processes.
    """

    record: MicroStepRecord = field(default_factory=MicroStepRecord)

    def take(self) -> MicroStepRecord:
        """The record of the micro-step that just ran; starts a new one."""
        record, self.record = self.record, MicroStepRecord()
        return record
