"""Initial weights that depend on the seed and the parameter's name, never on the layout."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_eslm.model.architectures.base import PADDED
from megatron_eslm.model.lora import LORA_A, LORA_B
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.parallel.seeding import generator


@torch.no_grad()
def init_parameters(
    module: nn.Module, shape: ModelShape, mesh: Mesh, *, seed: int, std: float
) -> None:
    """Initialize all parameters of `module` in place, as GPT-2 does, whatever the architecture.

    Weights are normal(0, std), projections into the residual stream normal(0, std / sqrt(2
    layers)), norms one and zero, biases zero. In adapters, A is normal(0, 1 / sqrt(columns of A))
    and B zero. A tensor-parallel shard is a slice of the full draw.
    """
    for name, parameter in module.named_parameters():
        if name.endswith((".bias", LORA_B)):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            scale = std / math.sqrt(2 * shape.num_layers) if residual else std
            full = list(parameter.shape)
            sharded = getattr(parameter, "tensor_model_parallel", False) and mesh.tp_size > 1
            dim: int = getattr(parameter, "partition_dim", 0)
            if sharded:
                full[dim] *= mesh.tp_size
            if name.endswith(LORA_A):
                scale = 1.0 / math.sqrt(full[1])
            if padded := name in PADDED:
                # The padded size of the vocabulary depends on the layout; padding is zero.
                full[0] = shape.vocab_size
            draw = torch.empty(full).normal_(0.0, scale, generator=generator(seed, "init", name))
            if padded:
                draw = F.pad(draw, (0, 0, 0, shape.padded_vocab_size - shape.vocab_size))
            if sharded:
                draw = draw.chunk(mesh.tp_size, dim=dim)[mesh.tp_rank]
            parameter.copy_(draw)
