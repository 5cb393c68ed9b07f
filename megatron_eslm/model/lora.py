"""Low-rank adapters of linear layers: y = W x + (alpha / rank) B A x with W frozen.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). B starts at zero,
so the first step sees the loaded model. An adapter is sharded over tensor-parallel ranks like its
layer: B of a column-parallel layer by rows, A of a row-parallel layer by columns; the other factor
is replicated. Communicated tensors are only as wide as the adapter's rank.

Shape legend: T positions, L positions of this rank (T / TP under sequence parallelism, else T), M
rows (sequences), R rank of the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import nn

from megatron_eslm.model.model_options import Lora

LORA_A, LORA_B = ".lora_a", ".lora_b"
"""Suffixes of the names of an adapter's factors: [R, in] and [out, R]."""


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def adapter_names(weight: str) -> tuple[str, str]:
    """Names of both adapter factors of a weight."""
    layer = weight.removesuffix(".weight")
    return layer + LORA_A, layer + LORA_B


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Train adapters only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


class AdaptedColumnLinear(ColumnParallelLinear):
    """[L, M, in] -> [T, M, out / TP]."""

    def __init__(self, d_in: int, d_out: int, lora: Lora, **settings: Any) -> None:
        super().__init__(d_in, d_out, **settings)
        self.lora = lora
        self.lora_a = nn.Parameter(torch.empty(lora.rank, d_in))
        self.lora_b = nn.Parameter(torch.empty(self.output_size_per_partition, lora.rank))

    def forward(self, x_LMD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, bias = super().forward(x_LMD)
        if self.sequence_parallel:
            # A rank sees only some positions, but A's gradient sums over all.
            lora_a = copy_to_tensor_model_parallel_region(self.lora_a, group=self.tp_group)
            low_TMR = gather_from_sequence_parallel_region(
                F.linear(x_LMD, lora_a), tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            low_TMR = copy_to_tensor_model_parallel_region(
                F.linear(x_LMD, self.lora_a), group=self.tp_group
            )
        return torch.add(out, F.linear(low_TMR, self.lora_b), alpha=self.lora.scale), bias


class AdaptedRowLinear(RowParallelLinear):
    """[T, M, in / TP] -> [L, M, out]."""

    def __init__(self, d_in: int, d_out: int, lora: Lora, **settings: Any) -> None:
        super().__init__(d_in, d_out, **settings)
        self.lora = lora
        self.lora_a = nn.Parameter(torch.empty(lora.rank, self.input_size_per_partition))
        self.lora_b = nn.Parameter(torch.empty(d_out, lora.rank))

    def forward(self, x_TMD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, bias = super().forward(x_TMD)
        low, lora_b = F.linear(x_TMD, self.lora_a), self.lora_b
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
            lora_b = copy_to_tensor_model_parallel_region(lora_b, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return torch.add(out, F.linear(low, lora_b), alpha=self.lora.scale), bias
