"""Handle steps with non-finite scores or gradients: count, log, and stop after too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist

from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.state import SelectionRecord

logger = logging.getLogger(__name__)

_NAMED = 8


class NonfiniteError(RuntimeError):
    """Too many steps in a row were not finite."""


class NonfiniteGuard:
    """Watches the records of each step. The engine does the skipping, on all ranks."""

    def __init__(self, max_in_a_row: int, mesh: Mesh) -> None:
        self.max_in_a_row = max_in_a_row
        self.mesh = mesh
        self._samples: list[int] = []

    def note(self, record: SelectionRecord, samples_M: Sequence[int]) -> None:
        """Remember which of this rank's samples (global numbers) were not finite."""
        rows_M = record.nonfinite_rows_M
        if record.num_nonfinite and rows_M is not None:
            self._samples += [samples_M[row] for row in rows_M.nonzero().squeeze(1).tolist()]

    def after_step(self, state: TrainState, *, applied: bool) -> NonfiniteError | None:
        """Count the step if it was skipped. Collective if it was.

        Returns:
            Why training cannot continue: `max_in_a_row` consecutive steps were skipped.
        """
        samples, self._samples = self._samples, []
        if applied:
            state.nonfinite_in_a_row = 0
            return None
        state.nonfinite_steps += 1
        state.nonfinite_in_a_row += 1
        # The stages of a pipeline see different scores of the same samples.
        stages: list = [None] * self.mesh.pp_size
        dist.all_gather_object(stages, samples, group=self.mesh.pp_group)
        samples = sorted({sample for stage in stages for sample in stage})
        everyone: list = [None] * self.mesh.dp_size
        dist.all_gather_object(everyone, samples, group=self.mesh.dp_group)
        where = "; ".join(
            f"data-parallel rank {rank}: samples {', '.join(map(str, found[:_NAMED]))}"
            + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
            for rank, found in enumerate(everyone)
            if found
        )
        what = f"scores ({where})" if where else "gradients"
        logger.warning(
            "iteration %d: %s not finite, step skipped (%d in a row, %d in all)",
            state.iteration,
            what,
            state.nonfinite_in_a_row,
            state.nonfinite_steps,
        )
        if state.nonfinite_in_a_row < self.max_in_a_row:
            return None
        return NonfiniteError(
            f"{state.nonfinite_in_a_row} steps in a row were not finite, the last with "
            f"{what}. Lower --lr, lengthen --lr-warmup-iters, or inspect these samples and "
            "continue from the last checkpoint, which predates them, with --skip-samples. "
            "--max-nonfinite-steps sets the limit."
        )
