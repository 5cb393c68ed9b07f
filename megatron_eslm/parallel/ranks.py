"""Which rank this process is and who goes first, for code that also runs without torch.

Importing torch takes seconds; tools that only look at files need not wait for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def has_group() -> bool:
    """Whether this process is one of a job's, which have met."""
    dist = sys.modules.get("torch.distributed")  # without it nobody has met
    return dist is not None and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in the job; 0 without a group."""
    return sys.modules["torch.distributed"].get_rank() if has_group() else 0


def first_on_machine() -> bool:
    """Whether this is the rank that checks for the others of its machine."""
    return rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"


def rank_zero_first(do: Callable[[], T]) -> T:
    """Run `do` on rank 0 and then on the others, which find what rank 0 has checked or written.

    A ConfigError of any rank is raised on all. Without a group it is `do()`.
    """
    if not has_group():
        return do()
    from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero

    made: list[T] = []
    on_rank_zero(lambda: made.append(do()))
    return on_every_rank(lambda: made[0] if made else do())
