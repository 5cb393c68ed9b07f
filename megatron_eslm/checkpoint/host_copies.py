"""Copies of weights and moments in host memory, for files written while training goes on."""

from __future__ import annotations

import torch


class HostCopies:
    """One copy of each tensor of a rank's share, in memory that later saves use again.

    Fresh memory costs more than the copy: the kernel clears each page at its first use, and pinned
    pages have to be registered with the driver. Copies from a CUDA device are pinned.

        copies = HostCopies()
        copy = copies.hold("weight/norm", tensor)
        copies.wait()
    """

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}

    def hold(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor over the last copy of this name.

        Args:
            name: its name in the file.
            tensor: of the same shape and dtype at every call; on any device.

        Returns:
            A contiguous copy on the CPU, complete after `wait`.
        """
        copy = self._copies.get(name)
        if copy is None:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = copy
        return copy.copy_(tensor, non_blocking=True)

    @property
    def num_bytes(self) -> int:
        """Size of all copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if any(copy.is_pinned() for copy in self._copies.values()):
            torch.cuda.current_stream().synchronize()
