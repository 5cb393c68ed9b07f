"""Dropout with masks that do not depend on the layout.

A mask is a function of (seed, layer, step, micro-step, row of the global micro-batch). Every data-,
tensor- and pipeline-parallel layout draws the same masks, and so does activation recomputation.
torch's own dropout draws from a random stream that each layout consumes differently.

Shape legend: T positions, L those of this rank (T unless sequence parallel), M rows, D hidden,
H heads of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.parallel.seeding import derive_seed


@dataclass(frozen=True)
class DropoutKey:
    """Identifies a layer's input within training; captured in the forward pass."""

    iteration: int
    micro_step: int
    rows: tuple[int, ...]
    """Row of the global micro-batch for each row of the input."""


class NamedDropout:
    """Inverted dropout with masks seeded by name.

    Args:
        probability: share to drop, in [0, 1).
        seed: the run's seed.
        name: the layer's name.
        mesh: determines the slice of a mask that a tensor-parallel rank needs.
        sequence_parallel: whether hidden states hold this rank's positions only.
    """

    def __init__(
        self, probability: float, seed: int, name: str, mesh: Mesh, sequence_parallel: bool
    ) -> None:
        self.probability = probability
        self._seed = seed
        self._name = name
        self._tp_rank, self._tp_size = mesh.tp_rank, mesh.tp_size
        self._parts = mesh.tp_size if sequence_parallel else 1

    def hidden(self, x_LMD: torch.Tensor, places: DropoutKey | None) -> torch.Tensor:
        """Apply dropout to hidden states [L, M, D]; without a key, as in evaluation, do nothing."""
        if not self.probability or places is None:
            return x_LMD
        s, _, d = x_LMD.shape
        masks = [self._draw((s * self._parts, d), x_LMD, places, row) for row in places.rows]
        # Without rows, too, the product saves its mask: with activation checkpoints and ZeRO 3, all
        # ranks must recompute as much.
        mask_TMD = torch.stack(masks, 1) if masks else x_LMD.new_empty(s * self._parts, 0, d)
        if self._parts > 1:
            mask_TMD = mask_TMD.chunk(self._parts)[self._tp_rank].clone()  # frees the full mask
        return x_LMD * mask_TMD

    def attention(self, weights_MHTT: torch.Tensor, places: DropoutKey) -> torch.Tensor:
        """Apply dropout to attention weights [M, H, T, T]."""
        _, heads, t, _ = weights_MHTT.shape
        first = heads * self._tp_rank
        masks = [
            self._draw((t, t), weights_MHTT, places, row, first + head)
            for row in places.rows
            for head in range(heads)
        ]
        mask = torch.stack(masks) if masks else torch.empty_like(weights_MHTT)
        return weights_MHTT * mask.view(weights_MHTT.shape)

    def _draw(
        self, shape: tuple[int, int], like: torch.Tensor, places: DropoutKey, *names: int
    ) -> torch.Tensor:
        """Draw a mask: 0 where dropped, 1 / (1 - p) elsewhere, in the dtype of `like`."""
        seed = derive_seed(
            self._seed, "dropout", self._name, places.iteration, places.micro_step, *names
        )
        generator = torch.Generator(like.device).manual_seed(seed)
        kept = torch.rand(shape, generator=generator, device=like.device) >= self.probability
        return kept.to(like.dtype) / (1.0 - self.probability)
