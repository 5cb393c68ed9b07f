"""Collectives that torch.distributed does not offer in the form we need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError

T = TypeVar("T")


def all_gather_same_shape(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Stack equal-shaped tensors of all ranks.

    Args:
        x: [...], the same shape on every rank of `group`.
        group: ranks to gather over; None means this rank alone.

    Returns:
        [group size, ...] in rank order, dtype of `x`. `x` is not changed.
    """
    if group is None or group.size() == 1:
        return x.unsqueeze(0)
    out = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(out.view(-1), x.reshape(-1), group=group)
    return out


def all_reduce_(
    x: torch.Tensor,
    group: dist.ProcessGroup | None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> torch.Tensor:
    """Reduce a contiguous tensor in place over `group` (None: this rank alone) and return it."""
    assert x.is_contiguous(), "a non-contiguous tensor would come back unreduced"
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=op, group=group)
    return x


def sum_later(
    count: torch.Tensor, group: dist.ProcessGroup | None, *, known: torch.Tensor | None = None
) -> Callable[[], torch.Tensor]:
    """Begin to add up a number over `group` (None: this rank alone) and go on.

    Args:
        count: int64 scalar, this rank's.
        group: the ranks.
        known: the sum, where all ranks have it already; nothing is added up then.

    Returns:
        A function that gives the sum, a scalar on the same device; call it once.
    """
    if known is not None:
        return lambda: known
    total, work = count.reshape(1), None
    if group is not None and group.size() > 1:
        work = dist.all_reduce(total, group=group, async_op=True)

    def wait() -> torch.Tensor:
        if work is not None:
            work.wait()
        return total.squeeze(0)

    return wait


def on_rank_zero(do: Callable[[], T]) -> T:
    """Run `do` on rank 0 and broadcast its result, or raise its ConfigError on every rank.

    All ranks stop with the same message, so that none waits for a rank that has stopped.
    """
    if dist.get_world_size() == 1:
        return do()
    result: list = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = do()
        except ConfigError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise ConfigError(result[1])
    return result[0]


def on_every_rank(do: Callable[[], T]) -> T:
    """Run `do` on every rank; if any raises ConfigError, all raise it and name the first rank."""
    if dist.get_world_size() == 1:
        return do()
    result, message = None, None
    try:
        result = do()
    except ConfigError as error:
        message = str(error)
    messages: list = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    failed = {rank: text for rank, text in enumerate(messages) if text is not None}
    if failed:
        texts = dict.fromkeys(failed.values())
        where = "" if len(failed) == len(messages) else f" (on rank {min(failed)})"
        raise ConfigError("; ".join(texts) + where)
    return result  # type: ignore[return-value]
