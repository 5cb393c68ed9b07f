"""Validation loss: the mean over all tokens of the validation set, whatever the policy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.data.device_copies import DeviceCopies
from megatron_eslm.data.mixture import Mixture
from megatron_eslm.engine.engine import Engine
from megatron_eslm.parallel.collectives import all_reduce_
from megatron_eslm.parallel.mesh import Mesh


@dataclass(frozen=True)
class Evaluation:
    """Mean losses in nats, each over every valid token once."""

    loss: float
    """Mean over the full set; nan if no token is valid."""
    loss_by_domain: dict[str, float]
    """Mean over each domain with sequences in the set, in the order of --data-path."""


def evaluate(engine: Engine, dataset: Mixture, mesh: Mesh, micro_batch_size: int) -> Evaluation:
    """Compute losses over every valid token of `dataset`. Collective.

    The set need not be a multiple of the micro-batch: ranks that run out of rows reread the first
    one with all labels masked, so that every rank takes part in every forward pass.
    """
    rows = micro_batch_size * mesh.dp_size
    begins = range(0, _round_up(len(dataset), rows), rows)
    copies, pins = DeviceCopies(engine.device), engine.device.type == "cuda"

    def numbers(begin: int) -> range:
        first = begin + mesh.dp_rank * micro_batch_size
        return range(first, first + micro_batch_size)

    def batches() -> Iterator[Batch]:
        for begin in begins:
            items = [dataset[i if i < len(dataset) else 0] for i in numbers(begin)]
            valid = torch.stack([item["valid"] for item in items])
            valid &= torch.tensor([i < len(dataset) for i in numbers(begin)])[:, None]
            tokens = torch.stack([item["tokens"] for item in items])
            yield Batch.of(*copies(x.pin_memory() if pins else x for x in (tokens, valid)))

    sums_R2 = engine.evaluate(batches(), len(begins), micro_batch_size)
    domain_R = torch.tensor(
        [dataset.domain_of(i) if i < len(dataset) else 0 for b in begins for i in numbers(b)]
    )
    names = [domain.name for domain in dataset.source.domains]
    # Sum on the CPU, where the order is deterministic.
    sums_D2 = torch.zeros(len(names), 2, dtype=torch.float64)
    sums_D2 = sums_D2.index_add_(0, domain_R, sums_R2.cpu()).to(engine.device)
    all_reduce_(sums_D2, mesh.dp_group)
    total, count = sums_D2.sum(dim=0).tolist()
    return Evaluation(
        loss=total / count if count else math.nan,
        loss_by_domain={
            name: loss / tokens
            for name, (loss, tokens) in zip(names, sums_D2.tolist(), strict=True)
            if tokens
        },
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
