"""State of selection: the position in training and the records of the micro-steps."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

import pydantic
import torch
import torch.distributed as dist

from megatron_eslm.files.schema import STRICT, Count
from megatron_eslm.watchdog.phases import Phases


@dataclass
class SelectionState:
    """State that policies read and the alpha controller updates; part of checkpoints."""

    __pydantic_config__ = STRICT

    alpha: Annotated[float, pydantic.Field(ge=0, le=1)]
    """Current share to drop; 0 where nothing is selected."""
    iteration: Count = 0
    """Current optimizer step, from 0."""
    micro_step: Count = 0
    """Current micro-step within the step, from 0."""
    level: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    """Alpha after its warm-up: --eslm-alpha, or the controller's latest value."""
    delta: float | None = None
    """Relative change of CVaR at the controller's last update (Algorithm 2)."""
    cvar_history: list[float] = field(default_factory=list)
    """CVaR of each past interval of the controller."""
    interval_cvar_sum: float = 0.0
    interval_finite_steps: Count = 0
    interval_steps: Count = 0
    """Steps so far in the controller's current interval."""
    mean_excess: float | None = None
    """Mean excess loss over all candidates, smoothed over steps."""
    overtaken_at: Count | None = None
    """The step, from 0, after which the model was found better than its reference."""


@dataclass(frozen=True)
class Peers:
    """The data-parallel ranks that share one global micro-batch."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    """None on a single rank."""
    phases: Phases = field(default_factory=Phases, compare=False)
    """Reports waits for other ranks to the watchdog."""


@dataclass
class SelectionRecord:
    """Selection on this rank: within a micro-step, or among a step's candidates before it.

    In a pipeline the first stage fills in the sequences, the last one the tokens and the loss. M
    rows of this rank, T positions. Counts are local; thresholds apply to all ranks in the scope of
    selection. Scores are nan where nothing was scored.
    """

    instance_scores_M: torch.Tensor | None = None
    instance_kept_M: torch.Tensor | None = None
    tau_instance: float | torch.Tensor | None = None
    token_scores_MT: torch.Tensor | None = None
    token_kept_MT: torch.Tensor | None = None
    tau_token: float | torch.Tensor | None = None
    cvar: float | torch.Tensor | None = None
    num_rows: int = 0
    num_rows_kept: int = 0
    num_tokens: int = 0
    """Valid tokens that were read."""
    num_tokens_in_kept_rows: int | torch.Tensor = 0
    """Valid tokens of kept rows."""
    num_tokens_scored: int = 0
    """Tokens whose logits the head computed."""
    num_tokens_kept: int = 0
    """Tokens in the loss."""
    num_nonfinite: int | torch.Tensor = 0
    """Scores that are not finite, over the ranks that were thresholded together."""
    nonfinite_rows_M: torch.Tensor | None = None
    """bool; local rows with a non-finite score."""
    loss: torch.Tensor | None = None
    """float32 scalar, this rank's term of the loss."""

    def cpu(self) -> SelectionRecord:
        """A copy with all tensors on the CPU."""
        copy = SelectionRecord()
        for f in fields(self):
            value = getattr(self, f.name)
            setattr(copy, f.name, value.cpu() if isinstance(value, torch.Tensor) else value)
        return copy


@dataclass
class Recorder:
    """Collects the records of the selecting layers for the training loop.

    Records cannot travel with the activations: a pipeline selects sequences and tokens in different
    processes, and each of these may be several micro-steps ahead of the other.
    """

    records: list[SelectionRecord] = field(default_factory=list)
    nonfinite_candidates: int = 0
    """Non-finite scores among the step's candidates. If there are any, none of the step's
    micro-steps count."""

    def begin(self) -> int:
        """Start the record of the next micro-step; returns its number within the step."""
        self.records.append(SelectionRecord(num_nonfinite=self.nonfinite_candidates))
        return len(self.records) - 1

    @property
    def record(self) -> SelectionRecord:
        """The record of the current micro-step."""
        return self.records[-1]

    def take(self) -> list[SelectionRecord]:
        """The records of all micro-steps since it was last called, in their order.

        Their numbers are on the host then: all are copied from the device at once.
        """
        records, self.records = self.records, []
        _read_numbers(records)
        return records


_COUNTS = ("num_tokens_in_kept_rows", "num_nonfinite")
_NUMBERS = ("tau_instance", "tau_token", "cvar", *_COUNTS)
"""Fields that are tensors on the device until the step is done."""


def _read_numbers(records: list[SelectionRecord]) -> None:
    found = [
        (record, name, value)
        for record in records
        for name in _NUMBERS
        if isinstance(value := getattr(record, name), torch.Tensor)
    ]
    if not found:
        return
    values = torch.stack([value.double() for _, _, value in found]).tolist()
    for (record, name, _), value in zip(found, values, strict=True):
        setattr(record, name, int(value) if name in _COUNTS else value)
