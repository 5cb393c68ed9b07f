"""What a step did, added up over its micro-steps and over the data-parallel ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from megatron_eslm.parallel.collectives import all_reduce_
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.state import MicroStepRecord
from megatron_eslm.training.flops import Work


@dataclass(frozen=True)
class StepStats:
    """One optimizer step over all data-parallel ranks."""

    loss: float
    """Mean over micro-steps of the loss that was minimised."""
    rows: int
    rows_kept: int
    tokens: int
    tokens_kept: int
    """Tokens in the loss."""
    kept_tokens_share: float
    """Of the valid tokens of kept rows."""
    tau_instance: float | None
    tau_token: float | None
    cvar: float | None
    work: Work
    stop_requested: bool
    """Some rank was asked to stop by a signal."""

    @property
    def kept_instances_share(self) -> float:
        """Kept rows over rows read."""
        return self.rows_kept / self.rows


def _mean(values: list[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return math.fsum(present) / len(present) if present else None


@dataclass
class StepAccumulator:
    """Takes up the records of a step's micro-steps."""

    seq_length: int
    losses: list[torch.Tensor] = field(default_factory=list)
    records: list[MicroStepRecord] = field(default_factory=list)

    def add(self, loss: torch.Tensor, record: MicroStepRecord) -> None:
        """A micro-step's local loss term and record; the record's tensors are let go."""
        self.losses.append(loss)
        self.records.append(record)

    def reduce(self, mesh: Mesh, *, stop: bool) -> StepStats:
        """One all-reduce for everything. Collective over the data-parallel ranks."""
        r = self.records
        local = [
            float(torch.stack(self.losses).sum()) / len(self.losses) / mesh.dp_size,
            float(sum(x.num_rows for x in r)),
            float(sum(x.num_rows_kept for x in r)),
            float(sum(x.num_tokens for x in r)),
            float(sum(x.num_tokens_in_kept_rows for x in r)),
            float(sum(x.num_tokens_kept for x in r)),
            float(sum(x.num_tokens_scored for x in r)),
            float(stop),
        ]
        device = self.losses[0].device
        total = torch.tensor(local, dtype=torch.float64, device=device)
        loss, *counts = all_reduce_(total, mesh.dp_group).tolist()
        rows, rows_kept, tokens, tokens_deep, tokens_kept, scored, stops = map(int, counts)
        return StepStats(
            loss=loss,
            rows=rows,
            rows_kept=rows_kept,
            tokens=tokens,
            tokens_kept=tokens_kept,
            kept_tokens_share=tokens_kept / max(1, tokens_deep),
            tau_instance=_mean([x.tau_instance for x in r]),
            tau_token=_mean([x.tau_token for x in r]),
            cvar=_mean([x.cvar for x in r]),
            work=Work(
                tokens=rows * self.seq_length,
                tokens_deep=rows_kept * self.seq_length,
                tokens_scored=scored,
                tokens_trained=tokens_kept,
            ),
            stop_requested=stops > 0,
        )
