"""Validation loss: the mean over all tokens of the validation set, whatever the policy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megatron_eslm.data.mixture import Mixture
from megatron_eslm.parallel.collectives import all_reduce_
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.batch import Batch
from megatron_eslm.training.engine import Engine


def evaluate(engine: Engine, dataset: Mixture, mesh: Mesh, micro_batch_size: int) -> float:
    """Mean loss in nats over every valid token of `dataset`, each once. Collective.

    The set does not have to divide into micro-batches: ranks that run out of rows read the first
    one again with all its labels masked, so that every rank takes part in every forward pass.
    """
    rows = micro_batch_size * mesh.dp_size
    begins = range(0, _round_up(len(dataset), rows), rows)

    def batches() -> Iterator[Batch]:
        for begin in begins:
            first = begin + mesh.dp_rank * micro_batch_size
            numbers = range(first, first + micro_batch_size)
            items = [dataset[i if i < len(dataset) else 0] for i in numbers]
            valid = torch.stack([item["valid"] for item in items])
            valid &= torch.tensor([i < len(dataset) for i in numbers])[:, None]
            tokens = torch.stack([item["tokens"] for item in items])
            yield Batch.of(tokens.to(engine.device), valid.to(engine.device))

    total = engine.evaluate(batches(), len(begins))
    all_reduce_(total, mesh.dp_group)
    loss, count = total.tolist()
    return loss / count if count else math.nan


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
