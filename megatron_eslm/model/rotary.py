"""Rotary position embeddings (RoFormer, arXiv 2104.09864), with linear and Llama 3 scaling.

Channels are paired as (c, c + K/2), as in the published Llama weights.
"""

from __future__ import annotations

import math

import torch

from megatron_eslm.model.shape import ModelShape

LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""Llama 3 scales wavelengths above original positions / LOW in full, below original positions /
HIGH not at all, and interpolates between."""


def inverse_frequencies(shape: ModelShape, device: torch.device | str = "cpu") -> torch.Tensor:
    """Angle per position of each pair of channels: float32 [K / 2]."""
    channels = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / shape.rotary_base ** (channels / shape.head_dim)
    if shape.rotary_scaling == "none":
        return frequency
    scaled = frequency / shape.rotary_scaling_factor
    if shape.rotary_scaling == "linear":
        return scaled
    assert shape.rotary_original_positions is not None
    turns = shape.rotary_original_positions * frequency / (2 * math.pi)
    share = ((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
    return torch.lerp(scaled, frequency, share)


class Rotary:
    """Cosines and sines by position; computed once per length and device, and shared by blocks."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._tables: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def tables(
        self, length: int, like: torch.Tensor, positions_TM: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up (cosines, sines), each [T, 1 or M, 1, 1, K].

        Args:
            length: T.
            like: gives dtype and device.
            positions_TM: int64, if rows count positions of their own; below T.
        """
        key = (like.device, like.dtype)
        table = self._tables.get(key)
        if table is None or table.shape[1] < length:
            positions = torch.arange(length, dtype=torch.float32, device=like.device)
            angles = torch.outer(positions, inverse_frequencies(self._shape, like.device))
            angles = angles.repeat(1, 2)[:, None, None, None]
            table = torch.stack([angles.cos(), angles.sin()]).to(like.dtype)
            self._tables[key] = table
        if positions_TM is None:
            return table[0, :length], table[1, :length]
        return table[0, positions_TM, 0], table[1, positions_TM, 0]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of channels of the last dimension; the result has x's shape and dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
