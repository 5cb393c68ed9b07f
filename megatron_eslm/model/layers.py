"""Layers of a decoder, built from megatron-core's tensor-parallel layers.

The architecture (model/architectures/) says which norm, activation and positions a model has.

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

from megatron_eslm.data.documents import CAUSAL, MaskAndPositions
from megatron_eslm.model.architectures.registry import architecture_of
from megatron_eslm.model.dropout import DropoutKey, NamedDropout
from megatron_eslm.model.lora import AdaptedColumnLinear, AdaptedRowLinear
from megatron_eslm.model.model_options import Lora
from megatron_eslm.model.rotary import Rotary, rotate
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.activations import ACTIVATIONS
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
        self.architecture = architecture_of(shape)
        self.rotary = Rotary(shape) if self.architecture.rotary else None
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
            "bias": self.architecture.bias,
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
        """Build a row-parallel layer, bias not added (see `with_bias`).

        [T, M, d_in / TP] -> [L, M, d_out].
        """
        settings: dict[str, Any] = {
            "config": self.megatron,
            "init_method": _no_init,
            "bias": self.architecture.bias,
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

    def with_bias(self, out_LMD: torch.Tensor, bias_D: torch.Tensor | None) -> torch.Tensor:
        """Add the bias of a row-parallel layer, if it has one."""
        return out_LMD if bias_D is None else out_LMD + self.shared(bias_D)

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
    """Word embedding, and positions where they are learned: tokens int64 [M, T+1] -> [L, M, D].

    A pipeline's last stage needs the word embedding only, as its tied head (`positions=False`).
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
        self.position: nn.Embedding | None = None
        if positions and not layout.architecture.rotary:
            self.position = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.dropout = dropout

    @property
    def weight(self) -> torch.Tensor:
        """The word embedding, which is also a tied head: [V / TP, D]."""
        return self.word.weight

    def forward(
        self,
        tokens_MU: torch.Tensor,
        places: DropoutKey | None = None,
        documents: MaskAndPositions = CAUSAL,
    ) -> torch.Tensor:
        inputs_TM = tokens_MU[:, :-1].t().contiguous()
        hidden_TMD = self.word(inputs_TM)
        if self.position is not None:
            if documents.positions_TM is None:
                positions_T = torch.arange(inputs_TM.shape[0], device=inputs_TM.device)
                hidden_TMD = hidden_TMD + self.position(positions_T)[:, None]
            else:
                hidden_TMD = hidden_TMD + self.position(documents.positions_TM)
        return self.dropout.hidden(self.layout.scatter(hidden_TMD), places)


class Output(nn.Module):
    """The weight of an untied head, sharded like the word embedding; the head multiplies by it."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        shape = layout.shape
        rows = shape.padded_vocab_size // layout.mesh.tp_size
        self.weight = nn.Parameter(torch.empty(rows, shape.hidden_size))
        _mark_sharded(self.weight, 0)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the hidden dimension of [L, M, D]; torch's own is fused on CUDA."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.shape.hidden_size, eps=layout.shape.layernorm_epsilon)
        self.layout = layout

    def forward(self, x_LMD: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layout.shared(self.weight), self.layout.shared(self.bias)
        return F.layer_norm(x_LMD, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the hidden dimension of [L, M, D]."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.shape.hidden_size, eps=layout.shape.layernorm_epsilon)
        self.layout = layout

    def forward(self, x_LMD: torch.Tensor) -> torch.Tensor:
        weight = self.layout.shared(self.weight)
        return F.rms_norm(x_LMD, self.normalized_shape, weight, self.eps)


def block_norm(layout: Layout) -> nn.Module:
    """Build a norm inside a block, over [L, M, D]."""
    return LayerNorm(layout) if layout.architecture.norm == "layer" else RMSNorm(layout)


def final_norm(shape: ModelShape) -> nn.Module:
    """Build the last norm; its input is gathered [T, M, D] or selected tokens [N, D]."""
    kind = nn.LayerNorm if architecture_of(shape).norm == "layer" else nn.RMSNorm
    return kind(shape.hidden_size, eps=shape.layernorm_epsilon)


class Attention(nn.Module):
    """Causal self-attention; heads are sharded over the tensor-parallel ranks.

    Each key-value head serves a group of query heads (arXiv 2305.13245; one each by default). The
    fused projection's rows are ordered (group, {its queries, key, value}, channel), so that a
    column shard holds complete groups.
    """

    def __init__(self, layout: Layout, dropout: NamedDropout) -> None:
        super().__init__()
        shape = layout.shape
        self.layout = layout
        self.num_groups_local = shape.num_key_value_heads // layout.mesh.tp_size
        self.queries_per_group = shape.num_attention_heads // shape.num_key_value_heads
        self.head_dim = shape.head_dim
        self.dropout = dropout
        heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
        self.qkv = layout.column(shape.hidden_size, heads * shape.head_dim)
        self.out = layout.row(shape.hidden_size, shape.hidden_size)

    def forward(
        self, x_LMD: torch.Tensor, places: DropoutKey | None, documents: MaskAndPositions = CAUSAL
    ) -> torch.Tensor:
        qkv, _ = self.qkv(x_LMD)
        q, k, v = self.heads(qkv, documents.positions_TM)
        return self.mixed(q, k, v, documents.mask_M1TT, places)

    def mixed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        places: DropoutKey | None = None,
    ) -> torch.Tensor:
        """Attention of queries to keys and values, and its projection: [L, M, D].

        Args:
            q: [M, heads, T, channels].
            k: [M, groups, T', channels].
            v: like k.
            mask: bool, broadcast to [M, heads, T, T']; None is causal.
            places: of dropout.
        """
        m, _, t, _ = q.shape
        if places is not None and self.dropout.probability:
            mixed = self._with_dropout(q, k, v, places, mask)
        else:
            grouped = self.queries_per_group > 1
            if grouped and mask is not None:
                # On CUDA no fused kernel takes both a mask and groups.
                k, v, grouped = self._per_query(k), self._per_query(v), False
            mixed = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, enable_gqa=grouped
            )
        # Not -1: m is 0 on a rank that keeps no row.
        columns = self.num_groups_local * self.queries_per_group * self.head_dim
        mixed_TMD = mixed.permute(2, 0, 1, 3).reshape(t, m, columns)
        return self.layout.with_bias(*self.out(mixed_TMD))

    def heads(
        self, qkv: torch.Tensor, positions_TM: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, M, columns] -> queries, keys, values, each [M, heads, T, channels]."""
        t, m, _ = qkv.shape
        of_group = self.queries_per_group + 2
        split = qkv.view(t, m, self.num_groups_local, of_group, self.head_dim)
        q, k, v = split.split([self.queries_per_group, 1, 1], dim=3)
        if self.layout.rotary is not None:
            cos, sin = self.layout.rotary.tables(t, split, positions_TM)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return tuple(part.flatten(2, 3).permute(1, 2, 0, 3) for part in (q, k, v))

    def _per_query(self, part: torch.Tensor) -> torch.Tensor:
        """Repeat keys or values for the queries that share them."""
        if self.queries_per_group == 1:
            return part
        return part.repeat_interleave(self.queries_per_group, dim=1)

    def _with_dropout(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        places: DropoutKey,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        # Fused kernels draw their own masks; ours need the unfused form.
        t = q.shape[2]
        k, v = self._per_query(k), self._per_query(v)
        if mask is None:
            mask = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
        scores = (q @ k.mT * self.head_dim**-0.5).masked_fill(~mask, -torch.inf)
        return self.dropout.attention(scores.softmax(dim=-1), places) @ v


class MLP(nn.Module):
    """Two projections with an activation between them; a gated one takes two columns for each.

    If given the tokens in the loss, the backward pass runs over these only (ops.kept_tokens_mlp).
    Not supported with sequence parallelism or adapters.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        shape, gated = layout.shape, layout.architecture.activation == "swiglu"
        self.layout = layout
        self.activation = ACTIVATIONS[layout.architecture.activation]
        self.up = layout.column(shape.hidden_size, (2 if gated else 1) * shape.ffn_hidden_size)
        self.down = layout.row(shape.ffn_hidden_size, shape.hidden_size)

    def forward(self, x_LMD: torch.Tensor, tokens: LossTokenIndex | None = None) -> torch.Tensor:
        if tokens is None:
            return self.layout.with_bias(*self.down(self.activation.apply(self.up(x_LMD)[0])))
        out_ND = kept_tokens_mlp(
            x_LMD.flatten(0, 1),
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.activation,
            tokens,
            self.layout.mesh.tp_group,
        )
        return self.layout.with_bias(out_ND.view(x_LMD.shape), self.down.bias)


class Block(nn.Module):
    """One pre-norm transformer block: hidden [L, M, D] -> [L, M, D]."""

    def __init__(self, layout: Layout, dropouts: dict[str, NamedDropout]) -> None:
        super().__init__()
        self.norm1 = block_norm(layout)
        self.attention = Attention(layout, dropouts["weights"])
        self.norm2 = block_norm(layout)
        self.mlp = MLP(layout)
        self.dropouts = dropouts

    def forward(
        self,
        x_LMD: torch.Tensor,
        places: DropoutKey | None = None,
        tokens: LossTokenIndex | None = None,
        documents: MaskAndPositions = CAUSAL,
    ) -> torch.Tensor:
        out_LMD = self.attention(self.norm1(x_LMD), places, documents)
        x_LMD = x_LMD + self.dropouts["attention"].hidden(out_LMD, places)
        out_LMD = self.mlp(self.norm2(x_LMD), tokens)
        return x_LMD + self.dropouts["mlp"].hidden(out_LMD, places)
