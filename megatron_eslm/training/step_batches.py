"""The micro-batches of an optimizer step: all that were read, or those selected.

Shape legend: C sequences that the step reads, in the order of their samples; M rows of a
micro-batch of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.data.device_copies import DeviceCopies
from megatron_eslm.data.loader import read_batch
from megatron_eslm.data.mixture import Mixture
from megatron_eslm.engine.engine import Engine
from megatron_eslm.ops.keep_rule import StepShape
from megatron_eslm.selection.state import SelectionRecord
from megatron_eslm.training.step_selection import Selection, rows_of_rank, select_candidates

Arrays = dict[str, torch.Tensor]
"""A batch as the loader yields it."""
Records = list[tuple[list[int], SelectionRecord]]
"""(row numbers among the C, record) pairs of this rank."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Batches that an optimizer step trains on."""

    batches: Iterator[Batch]
    """Batches of this rank, one per micro-step; a pipeline's middle stages must not read any."""
    shape: StepShape
    """Micro-batches per rank, equal on all ranks; in-model selection may drop rows."""
    micro_batches: list[list[int]]
    """This rank's row numbers among the C, per micro-step."""
    selection: Selection | None
    """None if nothing was selected before the step."""

    @property
    def nonfinite_candidates(self) -> int:
        """Scores of candidates that were not finite, over all ranks."""
        return 0 if self.selection is None else int(self.selection.record.num_nonfinite)

    def records(self, of_micro_steps: list[SelectionRecord]) -> Records:
        """All records of the finished step."""
        records = list(zip(self.micro_batches, of_micro_steps, strict=True))
        if self.selection is None:
            return records
        for record in of_micro_steps:
            record.num_rows = record.num_tokens = 0  # already counted as candidates
        return [(self.selection.own, self.selection.record), *records]


class StepBatches:
    """Yields this rank's batches of each step.

    Args:
        engine: engine with the model and the policy.
        dataset: source of sequences that the loader does not provide.
        loader: this rank's rows in sample order, M at a time; None on ranks that read none.
        rows: M.
    """

    def __init__(
        self, engine: Engine, dataset: Mixture, loader: Iterator[Arrays] | None, rows: int
    ) -> None:
        self.engine, self.dataset, self.loader, self.rows = engine, dataset, loader, rows
        self._copies = DeviceCopies(engine.device)

    def step(self, samples: list[int], alpha: float) -> Step:
        """Prepare the next step. Collective if sequences are selected before the step.

        Args:
            samples: numbers of the C sequences that the step reads.
            alpha: share to drop.
        """
        mesh, policy = self.engine.mesh, self.engine.model.policy
        shape = StepShape(len(samples) // (self.rows * mesh.dp_size), self.rows)
        selection = None
        if policy.traits.selects_per_step:
            candidates = (self._next() for _ in range(shape.micro_steps))
            selection = select_candidates(self.engine, candidates, len(samples), self.rows, alpha)
            if selection is None and not (mesh.is_first_stage or mesh.is_last_stage):
                # It trains on none of these, but its loader has to go on with the others.
                for _ in range(shape.micro_steps):
                    self._next()
        numbers: Sequence[int] = range(len(samples))
        if selection is not None:
            shape, numbers = selection.shape, selection.kept
        micro_batches = list(rows_of_rank(numbers, shape.rows, mesh))
        from_loader = selection is None and self.loader is not None
        return Step(
            batches=(
                self._next() if from_loader else self._read([samples[i] for i in rows])
                for rows in micro_batches
            ),
            shape=shape,
            micro_batches=micro_batches,
            selection=selection,
        )

    def _next(self) -> Batch:
        assert self.loader is not None
        with self.engine.phases("data"):
            arrays = next(self.loader)
        return self._on_device(arrays)

    def _read(self, samples: list[int]) -> Batch:
        with self.engine.phases("data"):
            pin = self.engine.device.type == "cuda"
            arrays = read_batch(self.dataset, samples, pin_memory=pin)
        return self._on_device(arrays)

    def _on_device(self, arrays: Arrays) -> Batch:
        keys = [key for key in ("tokens", "valid", "labels", "reference") if key in arrays]
        tensors = dict(zip(keys, self._copies(arrays[key] for key in keys), strict=True))
        return Batch.of(
            tensors["tokens"],
            tensors["valid"],
            tensors.get("labels"),
            tensors.get("reference"),
            arrays["valid"].sum(1),
        )
