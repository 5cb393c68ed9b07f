"""Select sequences once per optimizer step, before it: `--eslm-scope step`.

Source: Algorithm 1 of the ESLM paper with the global batch as its batch. All sequences that a step
reads are its candidates. All ranks share the scoring, without gradient; pipeline stages use copies
of the early exit's weights. The riskiest candidates are kept, as many as fill equal micro-batches
on all ranks. Thus shapes depend on alpha alone, and data-parallel ranks exchange only one number
per candidate. Each rank then reads the kept sequences that it trains on.

Shape legend: C candidates in the order of their samples; R data-parallel ranks; M rows of a
micro-batch of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.engine.engine import Engine
from megatron_eslm.ops.keep_rule import StepShape, keep_number
from megatron_eslm.parallel.collectives import all_gather_same_shape, all_reduce_
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.state import SelectionRecord


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Selection among the candidates of a step."""

    kept: list[int]
    """Kept candidates of all ranks, ascending; known on all ranks."""
    shape: StepShape
    """Micro-batches of every rank's share of `kept`."""
    own: list[int]
    """Candidates that this rank scored."""
    record: SelectionRecord
    """Record of this rank's candidates."""


def rows_of_rank(numbers: Sequence[int], rows: int, mesh: Mesh) -> Iterator[list[int]]:
    """Yield this rank's rows of each micro-step, given the rows of all ranks in order."""
    for begin in range(mesh.dp_rank * rows, len(numbers), rows * mesh.dp_size):
        yield list(numbers[begin : begin + rows])


def select_candidates(
    engine: Engine, batches: Iterator[Batch], num_candidates: int, rows: int, alpha: float
) -> Selection | None:
    """Score the candidates of the next step and keep the riskiest. Collective.

    Args:
        engine: engine with the model and the policy.
        batches: candidates of this data-parallel rank, M at a time, in the order of
            `rows_of_rank`.
        num_candidates: C, a multiple of M x R.
        rows: M.
        alpha: share to drop.

    Returns:
        None if nothing is dropped; nothing is scored then.
    """
    mesh, policy = engine.mesh, engine.model.policy
    read = StepShape(num_candidates // (rows * mesh.dp_size), rows)
    shape = read.kept(alpha)
    if shape == read:
        return None
    engine.prepare_scores()
    policy.state.micro_step = 0
    record, own = SelectionRecord(), list[int]()
    # A: micro-batches of this data-parallel rank, which its pipeline's stages score in turn.
    scores_AM = torch.zeros(read.micro_steps, rows, device=engine.device)
    for number, numbers in enumerate(rows_of_rank(range(num_candidates), rows, mesh)):
        batch = next(batches)
        if number % mesh.pp_size == mesh.pp_rank:
            candidates = Rows(numbers[0], rows, num_candidates)
            scores_AM[number] = engine.candidate_scores(batch, candidates)
            record.num_tokens += batch.num_valid()
            own += numbers
    with engine.phases("proxy gather", waits=mesh.world_size > 1):
        all_reduce_(scores_AM, mesh.pp_group)  # rows scored by other stages are zero
        scores_RAM = all_gather_same_shape(scores_AM, mesh.dp_group)
        scores_C = scores_RAM.transpose(0, 1).flatten().contiguous()
        if mesh.tp_size > 1:
            # Use one rank's scores everywhere, so that rounding cannot change a rank's decision.
            dist.broadcast(scores_C, dist.get_global_rank(mesh.tp_group, 0), group=mesh.tp_group)
        scores_C = scores_C.cpu()  # what is decided now needs the device no more
    record.num_rows = len(own)
    kept = keep_number(scores_C, shape.sequences * mesh.dp_size)
    scores_M = scores_C[own]
    record.instance_scores_M = scores_M
    record.instance_kept_M = kept.keep[own]
    record.tau_instance = kept.tau
    record.num_nonfinite = kept.num_nonfinite
    record.nonfinite_rows_M = torch.isnan(scores_M) | (scores_M == torch.inf)
    return Selection(
        kept=kept.keep.nonzero().squeeze(1).tolist(), shape=shape, own=own, record=record
    )
