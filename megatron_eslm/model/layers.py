"""The layers of a GPT-2 decoder, built from megatron-core's tensor-parallel layers.

Shape legend: T positions, L positions of this rank (T / TP under sequence parallelism, else T), M
rows (sequences), D hidden. Activations are [L, M, D], Megatron's order, which sequence parallelism
needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import nn

from megatron_eslm.model.dropout import DropoutKey, NamedDropout
from megatron_eslm.model.lora import AdaptedColumnLinear, AdaptedRowLinear
from megatron_eslm.model.model_options import Lora
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.kept_tokens_mlp import LossTokenIndex, kept_tokens_mlp
from megatron_eslm.parallel.mesh import Mesh


def _no_init(weight: torch.Tensor) -> torch.Tensor:
    return weight  # model.init initializes every parameter by name


def _mark_sharded(weight: torch.Tensor, dim: int) -> None:
    """Record the dimension along which a weight is sharded over tensor-parallel ranks.

    megatron-core records it only if it also draws the initial values.
    """
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


class Layout:
    """Builds layers sharded over ranks, and moves activations between layouts."""

    def __init__(
        self, shape: ModelShape, mesh: Mesh, sequence_parallel: bool, lora: Lora | None = None
    ) -> None:
        self.shape = shape
        self.mesh = mesh
        self.lora = lora
        self.sequence_parallel = sequence_parallel and mesh.tp_size > 1
        if self.sequence_parallel and parallel_state._GLOBAL_MEMORY_BUFFER is None:
            # megatron-core's linear layers gather into this buffer. It is normally created with the
            # global groups, which we do not use.
            parallel_state._set_global_memory_buffer()
        self.megatron = ModelParallelConfig(
            tensor_model_parallel_size=mesh.tp_size,
            sequence_parallel=self.sequence_parallel,
            use_cpu_initialization=True,
            perform_initialization=False,
        )

    def column(self, d_in: int, d_out: int) -> ColumnParallelLinear:
        """Build a column-parallel layer: [L, M, d_in] -> [T, M, d_out / TP]."""
        settings: dict[str, Any] = {
            "config": self.megatron,
            "init_method": _no_init,
            "tp_group": self.mesh.tp_group,
        }
        if self.lora is None:
            layer = ColumnParallelLinear(d_in, d_out, **settings)
        else:
            layer = AdaptedColumnLinear(d_in, d_out, self.lora, **settings)
            _mark_sharded(layer.lora_b, 0)
        _mark_sharded(layer.weight, 0)
        return layer

    def row(self, d_in: int, d_out: int) -> RowParallelLinear:
        """Build a row-parallel layer, bias not added (see `shared`).

        [T, M, d_in / TP] -> [L, M, d_out].
        """
        settings: dict[str, Any] = {
            "config": self.megatron,
            "init_method": _no_init,
            "bias": True,
            "input_is_parallel": True,
            "skip_bias_add": True,
            "tp_group": self.mesh.tp_group,
        }
        if self.lora is None:
            layer = RowParallelLinear(d_in, d_out, **settings)
        else:
            layer = AdaptedRowLinear(d_in, d_out, self.lora, **settings)
            _mark_sharded(layer.lora_a, 1)
        _mark_sharded(layer.weight, 1)
        return layer

    def shared(self, parameter: torch.Tensor) -> torch.Tensor:
        """Wrap a parameter replicated on all tensor-parallel ranks, for use on [L, M, D].

        Under sequence parallelism a rank sees only some positions, so the gradient is summed over
        the ranks in the backward pass. Engines and ZeRO stages then see the full gradient.
        """
        if not self.sequence_parallel:
            return parameter
        return copy_to_tensor_model_parallel_region(parameter, group=self.mesh.tp_group)

    def scatter(self, x_TMD: torch.Tensor) -> torch.Tensor:
        """[T, M, D] on every tensor-parallel rank -> [L, M, D], this rank's positions."""
        if not self.sequence_parallel:
            return x_TMD
        return scatter_to_sequence_parallel_region(x_TMD, group=self.mesh.tp_group)

    def gather(self, x_LMD: torch.Tensor) -> torch.Tensor:
        """[L, M, D] -> [T, M, D] on every rank; every rank must have the full gradient."""
        if not self.sequence_parallel:
            return x_LMD
        return gather_from_sequence_parallel_region(
            x_LMD, tensor_parallel_output_grad=False, group=self.mesh.tp_group
        )


class Embedding(nn.Module):
    """Word and position embeddings: tokens int64 [M, T+1] -> hidden [L, M, D].

    A pipeline's last stage needs the word embedding only, as its head (`positions=False`).
    """

    def __init__(self, layout: Layout, dropout: NamedDropout, *, positions: bool = True) -> None:
        super().__init__()
        shape = layout.shape
        self.layout = layout
        self.word = VocabParallelEmbedding(
            shape.padded_vocab_size,
            shape.hidden_size,
            init_method=_no_init,
            config=layout.megatron,
            tp_group=layout.mesh.tp_group,
        )
        _mark_sharded(self.word.weight, 0)
        if positions:
            self.position = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.dropout = dropout

    def forward(self, tokens_MU: torch.Tensor, places: DropoutKey | None = None) -> torch.Tensor:
        inputs_TM = tokens_MU[:, :-1].t().contiguous()
        positions_T = torch.arange(inputs_TM.shape[0], device=inputs_TM.device)
        hidden_TMD = self.word(inputs_TM) + self.position(positions_T)[:, None]
        return self.dropout.hidden(self.layout.scatter(hidden_TMD), places)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the hidden dimension of [L, M, D]; torch's own is fused on CUDA."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.shape.hidden_size, eps=layout.shape.layernorm_epsilon)
        self.layout = layout

    def forward(self, x_LMD: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layout.shared(self.weight), self.layout.shared(self.bias)
        return F.layer_norm(x_LMD, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention; heads are sharded over the tensor-parallel ranks.

    The fused projection's rows are ordered (head, {query, key, value}, channel), so that a column
    shard holds complete heads.
    """

    def __init__(self, layout: Layout, dropout: NamedDropout) -> None:
        super().__init__()
        shape = layout.shape
        self.layout = layout
        self.num_heads_local = shape.num_attention_heads // layout.mesh.tp_size
        self.head_dim = shape.head_dim
        self.dropout = dropout
        self.qkv = layout.column(shape.hidden_size, 3 * shape.hidden_size)
        self.out = layout.row(shape.hidden_size, shape.hidden_size)

    def forward(self, x_LMD: torch.Tensor, places: DropoutKey | None) -> torch.Tensor:
        qkv, _ = self.qkv(x_LMD)
        t, m, _ = qkv.shape
        # [T, M, heads, 3, channels] -> 3 x [M, heads, T, channels]
        q, k, v = qkv.view(t, m, self.num_heads_local, 3, self.head_dim).permute(3, 1, 2, 0, 4)
        if places is not None and self.dropout.probability:
            mixed = self._with_dropout(q, k, v, places)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # Not -1: m is 0 on a rank that keeps no row.
        mixed_TMD = mixed.permute(2, 0, 1, 3).reshape(t, m, self.num_heads_local * self.head_dim)
        out_LMD, bias = self.out(mixed_TMD)
        return out_LMD + self.layout.shared(bias)

    def _with_dropout(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: DropoutKey
    ) -> torch.Tensor:
        # Fused kernels draw their own masks; ours need the unfused form.
        t = q.shape[2]
        future_TT = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT * self.head_dim**-0.5).masked_fill(future_TT, -torch.inf)
        return self.dropout.attention(scores.softmax(dim=-1), places) @ v


class MLP(nn.Module):
    """Two projections with GELU (tanh form) between them.

    If given the tokens in the loss, the backward pass runs over these only (ops.kept_tokens_mlp).
    Not supported with sequence parallelism or adapters.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.up = layout.column(layout.shape.hidden_size, layout.shape.ffn_hidden_size)
        self.down = layout.row(layout.shape.ffn_hidden_size, layout.shape.hidden_size)

    def forward(self, x_LMD: torch.Tensor, tokens: LossTokenIndex | None = None) -> torch.Tensor:
        if tokens is None:
            out_LMD, bias = self.down(F.gelu(self.up(x_LMD)[0], approximate="tanh"))
            return out_LMD + self.layout.shared(bias)
        out_ND = kept_tokens_mlp(
            x_LMD.flatten(0, 1),
            self.up.weight,
            self.up.bias,
            self.down.weight,
            tokens,
            self.layout.mesh.tp_group,
        )
        return out_ND.view(x_LMD.shape) + self.down.bias


class Block(nn.Module):
    """One pre-norm transformer block: hidden [L, M, D] -> [L, M, D]."""

    def __init__(self, layout: Layout, dropouts: dict[str, NamedDropout]) -> None:
        super().__init__()
        self.norm1 = LayerNorm(layout)
        self.attention = Attention(layout, dropouts["weights"])
        self.norm2 = LayerNorm(layout)
        self.mlp = MLP(layout)
        self.dropouts = dropouts

    def forward(
        self,
        x_LMD: torch.Tensor,
        places: DropoutKey | None = None,
        tokens: LossTokenIndex | None = None,
    ) -> torch.Tensor:
        out_LMD = self.attention(self.norm1(x_LMD), places)
        x_LMD = x_LMD + self.dropouts["attention"].hidden(out_LMD, places)
        out_LMD = self.mlp(self.norm2(x_LMD), tokens)
        return x_LMD + self.dropouts["mlp"].hidden(out_LMD, places)


class FinalNorm(nn.LayerNorm):
    """The last layer norm; its input is gathered [T, M, D] or selected tokens [N, D]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape.hidden_size, eps=shape.layernorm_epsilon)
