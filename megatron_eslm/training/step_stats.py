"""What a step did, added up over its micro-steps and over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """Thresholds and CVaR are means over micro-steps, and over ranks where each decides alone."""
    work: Work
    stop_requested: bool
    """Some rank was asked to stop by a signal."""

    @property
    def kept_instances_share(self) -> float:
        """Kept rows over rows read."""
        return self.rows_kept / self.rows


_SUMMED = (
    "num_rows",
    "num_rows_kept",
    "num_tokens",
    "num_tokens_in_kept_rows",
    "num_tokens_kept",
    "num_tokens_scored",
)
_AVERAGED = ("tau_instance", "tau_token", "cvar")


def reduce_records(
    records: list[MicroStepRecord],
    mesh: Mesh,
    seq_length: int,
    device: torch.device,
    *,
    stop: bool,
) -> StepStats:
    """What the micro-steps of a step did, over all ranks. Collective.

    Each stage of a pipeline holds a part of every record; tensor-parallel ranks hold the same.
    """
    losses = [x.loss for x in records if x.loss is not None]
    loss = float(torch.stack(losses).sum()) / len(losses) / mesh.dp_size if losses else 0.0
    stops = torch.tensor([float(stop)], device=device)
    all_reduce_(stops, mesh.tp_group)  # a signal may have reached one of them only
    over_all = [loss, float(stops), *(float(sum(getattr(x, n) for x in records)) for n in _SUMMED)]
    averaged = [f for name in _AVERAGED for f in _sum_and_count(records, name)]
    totals = torch.tensor(over_all + averaged, dtype=torch.float64, device=device)
    all_reduce_(totals, mesh.pp_group)
    all_reduce_(totals, mesh.dp_group)
    loss, num_stops, *counts = totals[: len(over_all)].tolist()
    rows, rows_kept, tokens, tokens_deep, tokens_kept, scored = map(int, counts)
    averages = dict(
        zip(_AVERAGED, _means(totals[len(over_all) :].view(-1, 2).tolist()), strict=True)
    )
    return StepStats(
        loss=loss,
        rows=rows,
        rows_kept=rows_kept,
        tokens=tokens,
        tokens_kept=tokens_kept,
        kept_tokens_share=tokens_kept / max(1, tokens_deep),
        work=Work(
            tokens=rows * seq_length,
            tokens_deep=rows_kept * seq_length,
            tokens_scored=scored,
            tokens_trained=tokens_kept,
        ),
        stop_requested=num_stops > 0,
        **averages,
    )


def _sum_and_count(records: list[MicroStepRecord], name: str) -> tuple[float, float]:
    present = [v for x in records if (v := getattr(x, name)) is not None]
    return math.fsum(present), float(len(present))


def _means(pairs: list[list[float]]) -> list[float | None]:
    return [total / count if count else None for total, count in pairs]
