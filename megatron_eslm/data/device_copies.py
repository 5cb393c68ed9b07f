"""Micro-batches are copied to the device beside what it computes.

On CUDA a stream works in order: a copy in the stream of the computation would wait for all
micro-steps that the host has launched so far, and the next one for the copy. So copies have a
stream of their own. The computation waits for the copy that it reads; the host does not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class DeviceCopies:
    """Copies tensors to a device; on CUDA in a stream of its own.

    copies = DeviceCopies(device)
    tokens_MU, valid_MT = copies([tokens_MU, valid_MT])
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Begin to copy, and have the current stream wait for the copies.

        Args:
            tensors: on the CPU; pinned for CUDA, else the host waits for each copy.

        Returns:
            The copies, ready for the current stream; on a CPU the tensors themselves.
        """
        if self._stream is None:
            return [tensor.to(self._device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        computes = torch.cuda.current_stream(self._device)
        computes.wait_stream(self._stream)
        for copy in copies:
            # Its memory is of the other stream, which must not write there again before the
            # computation has read it.
            copy.record_stream(computes)
        return copies
