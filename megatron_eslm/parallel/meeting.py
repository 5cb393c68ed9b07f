"""The ranks of a job that have met."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Meeting:
    """The ranks that have met."""

    rank: int
    world_size: int
    store: dist.Store
    """Of this job alone."""
    launcher_keeps_store: bool = False
    """torchrun does, and outlives the ranks; else rank 0."""
