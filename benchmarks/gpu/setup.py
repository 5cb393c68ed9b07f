"""What all rows know of the machine and of the size of the measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eslm.cost.flops import device_peak_flops


@dataclass(frozen=True)
class Setup:
    """Of one call of `python -m benchmarks.gpu`."""

    toy: bool
    """Small shapes and bounds that any machine meets, to test the script itself."""
    cuda: bool
    folder: Path
    """For data, checkpoints and logs."""
    peak_tflops: float | None = None
    """--peak-tflops."""

    @property
    def device(self) -> torch.device:
        """Of the measurements."""
        return torch.device("cuda" if self.cuda else "cpu")

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 peak of the device, in FLOP/s; None where it is not known."""
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        return device_peak_flops(name, self.peak_tflops)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize()
