"""Copies of weights and moments in host memory, for files written while training goes on."""

from __future__ import annotations

import logging

import torch

from megatron_eslm.errors import ConfigError, first_line

logger = logging.getLogger(__name__)


class HostCopies:
    """One copy of each tensor of a rank's share, in memory that later saves use again.

    Fresh memory costs more than the copy: the kernel clears each page at its first use, and pinned
    pages have to be registered with the driver. Copies from a CUDA device are pinned, as far as the
    machine lets processes pin memory; the others make training stand still longer.

        copies = HostCopies()
        copy = copies.hold("weight/norm", tensor)
        copies.wait()
    """

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}
        self._pins = True
        """Whether pinned memory has not been refused yet."""
        self._cuda = False

    def hold(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor over the last copy of this name.

        Args:
            name: its name in the file.
            tensor: of the same shape and dtype at every call; on any device.

        Returns:
            A contiguous copy on the CPU, complete after `wait`.

        Raises:
            ConfigError: there is no memory for it.
        """
        copy = self._copies.get(name)
        if copy is None:
            copy = self._copies[name] = self._memory_for(tensor)
        self._cuda |= tensor.is_cuda
        return copy.copy_(tensor, non_blocking=True)

    @property
    def num_bytes(self) -> int:
        """Size of all copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._cuda:
            torch.cuda.current_stream().synchronize()

    def _memory_for(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda and self._pins:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                logger.warning(
                    "no more pinned memory for the copies of --async-save after %.1f GiB (%s): the "
                    "others are pageable, so training stands still longer at a save. A higher "
                    "limit of locked memory (ulimit -l) or --no-async-save avoids this.",
                    self.num_bytes / 2**30,
                    first_line(error),
                )
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        except RuntimeError as error:
            raise ConfigError(
                f"--async-save: no host memory for a copy of {tensor.nbytes / 2**20:.1f} MiB after "
                f"{self.num_bytes / 2**30:.1f} GiB ({first_line(error)}). --dry-run prints what "
                "the copies take; --no-async-save does without them."
            ) from error
