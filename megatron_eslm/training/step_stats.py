"""Statistics of a step, reduced over its micro-steps and over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_eslm.cost.flops import Work
from megatron_eslm.parallel.collectives import all_reduce_
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.state import SelectionRecord
from megatron_eslm.training.mean_excess import NUM_SUMS, excess_sums, mean_excess


@dataclass(frozen=True)
class StepStats:
    """Statistics of one optimizer step over all data-parallel ranks."""

    loss: float
    """Mean over micro-steps of the loss that was minimised."""
    rows: int
    rows_kept: int
    tokens: int
    tokens_kept: int
    """Tokens in the loss."""
    kept_tokens_share: float
    """Share of the valid tokens of kept rows that are in the loss."""
    tau_instance: float | None
    tau_token: float | None
    cvar: float | None
    """Thresholds and CVaR are means over micro-steps, and over ranks if each decides alone."""
    mean_excess: float | None
    """Mean excess loss (mean_excess.py); None where nothing is scored by it."""
    work: Work
    stop_votes: tuple[float, ...]
    """Number of ranks per reason to stop (training/stopping.py)."""

    @property
    def kept_instances_share(self) -> float:
        """Rows kept / rows read."""
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
    records: list[SelectionRecord],
    mesh: Mesh,
    seq_length: int,
    device: torch.device,
    *,
    excess: bool,
    stop_votes: Sequence[float],
) -> StepStats:
    """Reduce the records of a step over micro-steps and ranks. Collective.

    Each pipeline stage holds a part of every record; tensor-parallel ranks hold the same part.

    Args:
        records: records of this rank and stage.
        mesh: this rank's position in the mesh.
        seq_length: T.
        device: device of the collectives.
        excess: whether scores are excess losses, whose mean is wanted.
        stop_votes: this rank's number per reason to stop.
    """
    losses = [x.loss for x in records if x.loss is not None]
    loss = float(torch.stack(losses).sum()) / len(losses) / mesh.dp_size if losses else 0.0
    counted = [loss, *(float(sum(getattr(x, n) for x in records)) for n in _SUMMED)]
    averaged = [f for name in _AVERAGED for f in _sum_and_count(records, name)]
    votes = torch.tensor(stop_votes, dtype=torch.float64, device=device)
    # Tensor-parallel ranks agree in everything but the votes.
    all_reduce_(votes, mesh.tp_group)
    excesses = excess_sums(records if excess else [], device)
    totals = torch.cat([votes.new_tensor(counted + averaged), excesses, votes])
    all_reduce_(totals, mesh.pp_group)
    all_reduce_(totals, mesh.dp_group)
    sizes = [len(counted), len(averaged), NUM_SUMS, len(votes)]
    (loss, *counts), sums, excesses_of_all, stops = (part.tolist() for part in totals.split(sizes))
    rows, rows_kept, tokens, tokens_deep, tokens_kept, scored = map(int, counts)
    means = _means(list(zip(sums[::2], sums[1::2], strict=True)))
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
        mean_excess=mean_excess(excesses_of_all),
        stop_votes=tuple(stops),
        **dict(zip(_AVERAGED, means, strict=True)),
    )


def _sum_and_count(records: list[SelectionRecord], name: str) -> tuple[float, float]:
    present = [v for x in records if (v := getattr(x, name)) is not None]
    return math.fsum(present), float(len(present))


def _means(pairs: list[tuple[float, float]]) -> list[float | None]:
    return [total / count if count else None for total, count in pairs]
