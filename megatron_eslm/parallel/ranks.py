"""Rank queries and ordering for code that also runs without torch.

Importing torch takes seconds, which tools that only read files can avoid.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def has_group() -> bool:
    """Whether torch.distributed is initialized in this process."""
    dist = sys.modules.get("torch.distributed")  # not imported: not initialized
    return dist is not None and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Global rank; 0 without a process group."""
    return sys.modules["torch.distributed"].get_rank() if has_group() else 0


def first_on_machine() -> bool:
    """Whether this rank runs the checks for all ranks of its machine."""
    return rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"


def rank_zero_first(do: Callable[[], T]) -> T:
    """Run `do` on rank 0, then on the others, which can use what rank 0 has checked or written.

    A ConfigError on any rank is raised on all. Without a process group, simply calls `do`.
    """
    if not has_group():
        return do()
    from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero

    made: list[T] = []
    on_rank_zero(lambda: made.append(do()))
    return on_every_rank(lambda: made[0] if made else do())
