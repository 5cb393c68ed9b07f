"""The layers of a GPT-2 decoder, on megatron-core's tensor-parallel building blocks.

Each layer takes and returns one tuple of tensors, so that a list of them is a module when called in
turn and a pipeline when dealt out over stages. Shape legend: T positions, M rows (sequences),
D hidden. Activations are [T, M, D], Megatron's order, which sequence parallelism needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import nn

from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.mesh import Mesh

Carry = tuple[torch.Tensor, ...]


def _no_init(weight: torch.Tensor) -> torch.Tensor:
    return weight  # model.init gives every parameter its values, by name


def megatron_config(mesh: Mesh) -> ModelParallelConfig:
    """What megatron-core's layers want to know."""
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        pipeline_dtype=torch.float32 if mesh.pp_size > 1 else None,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


def _mark_sharded(weight: torch.Tensor, dim: int) -> None:
    """Say along which dimension a weight is cut over tensor-parallel ranks.

    megatron-core says so itself only where it also draws the initial values.
    """
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def _column(d_in: int, d_out: int, mesh: Mesh) -> ColumnParallelLinear:
    layer = ColumnParallelLinear(
        d_in, d_out, config=megatron_config(mesh), init_method=_no_init, tp_group=mesh.tp_group
    )
    _mark_sharded(layer.weight, 0)
    return layer


def _row(d_in: int, d_out: int, mesh: Mesh) -> RowParallelLinear:
    layer = RowParallelLinear(
        d_in,
        d_out,
        config=megatron_config(mesh),
        init_method=_no_init,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=mesh.tp_group,
    )
    _mark_sharded(layer.weight, 1)
    return layer


class Embedding(nn.Module):
    """Word and position embeddings: (tokens int64 [M, T+1], valid) -> (hidden [T, M, D], ...)."""

    def __init__(self, shape: ModelShape, mesh: Mesh, hidden_dropout: float) -> None:
        super().__init__()
        self.word = VocabParallelEmbedding(
            shape.padded_vocab_size,
            shape.hidden_size,
            init_method=_no_init,
            config=megatron_config(mesh),
            tp_group=mesh.tp_group,
        )
        _mark_sharded(self.word.weight, 0)
        self.position = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.dropout = nn.Dropout(hidden_dropout)

    def forward(self, carry: Carry) -> Carry:
        tokens_MS, *rest = carry
        inputs_TM = tokens_MS[:, :-1].t().contiguous()
        positions_T = torch.arange(inputs_TM.shape[0], device=inputs_TM.device)
        hidden_TMD = self.word(inputs_TM) + self.position(positions_T)[:, None]
        return (self.dropout(hidden_TMD), tokens_MS, *rest)


class Attention(nn.Module):
    """Causal multi-head self-attention; heads are spread over the tensor-parallel ranks.

    The fused projection's rows are ordered (head, {query, key, value}, channel), so that a column
    shard holds whole heads.
    """

    def __init__(self, shape: ModelShape, mesh: Mesh, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads_local = shape.num_attention_heads // mesh.tp_size
        self.head_dim = shape.head_dim
        self.attention_dropout = attention_dropout
        self.qkv = _column(shape.hidden_size, 3 * shape.hidden_size, mesh)
        self.out = _row(shape.hidden_size, shape.hidden_size, mesh)

    def forward(self, x_TMD: torch.Tensor) -> torch.Tensor:
        t, m, _ = x_TMD.shape
        qkv, _ = self.qkv(x_TMD)
        # [T, M, heads, 3, channels] -> three of [M, heads, T, channels]
        q, k, v = qkv.view(t, m, self.num_heads_local, 3, self.head_dim).permute(3, 1, 2, 0, 4)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.attention_dropout if self.training else 0.0
        )
        # Not -1: a rank that keeps no row passes m = 0 through here.
        mixed_TMD = mixed.permute(2, 0, 1, 3).reshape(t, m, self.num_heads_local * self.head_dim)
        return self.out(mixed_TMD)[0]


class MLP(nn.Module):
    """Two projections with GELU (tanh form) between them."""

    def __init__(self, shape: ModelShape, mesh: Mesh) -> None:
        super().__init__()
        self.up = _column(shape.hidden_size, shape.ffn_hidden_size, mesh)
        self.down = _row(shape.ffn_hidden_size, shape.hidden_size, mesh)

    def forward(self, x_TMD: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x_TMD)[0], approximate="tanh"))[0]


class Block(nn.Module):
    """One pre-norm transformer block; what rides along with the hidden states passes through."""

    def __init__(
        self, shape: ModelShape, mesh: Mesh, *, hidden_dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(shape)
        self.attention = Attention(shape, mesh, attention_dropout)
        self.norm2 = layer_norm(shape)
        self.mlp = MLP(shape, mesh)
        self.dropout = nn.Dropout(hidden_dropout)

    def forward(self, carry: Carry) -> Carry:
        x_TMD, *rest = carry
        x_TMD = x_TMD + self.dropout(self.attention(self.norm1(x_TMD)))
        x_TMD = x_TMD + self.dropout(self.mlp(self.norm2(x_TMD)))
        return (x_TMD, *rest)


def layer_norm(shape: ModelShape) -> nn.LayerNorm:
    """Layer norm over the hidden dimension; torch's own is fused on CUDA."""
    return nn.LayerNorm(shape.hidden_size, eps=shape.layernorm_epsilon)
