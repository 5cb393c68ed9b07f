"""Result of the rendezvous."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Meeting:
    """A rank's view of the job after the rendezvous."""

    rank: int
    world_size: int
    store: dist.Store
    """Store of this job only."""
    launcher_keeps_store: bool = False
    """True under torchrun, whose store outlives the ranks; otherwise rank 0 hosts the store."""
