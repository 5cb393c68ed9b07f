"""Llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases.

Shape legend: D hidden size, F MLP width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_eslm.model.architectures import llama_config
from megatron_eslm.model.architectures.base import (
    OUTPUT,
    WORD_EMBEDDING,
    Architecture,
    HuggingFace,
    Weight,
    cut_vocabulary,
    pad_vocabulary,
    vocabulary,
    width,
)
from megatron_eslm.model.shape import ModelShape


def _split_qkv(weight: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """Rows (group, {its queries, key, value}, K), megatron-core's order -> q, k, v."""
    groups, k = shape.num_key_value_heads, shape.head_dim
    per_group = shape.num_attention_heads // groups
    split = weight.reshape(groups, per_group + 2, k, shape.hidden_size)
    return tuple(
        part.reshape(-1, shape.hidden_size) for part in split.split([per_group, 1, 1], dim=1)
    )


def _join_qkv(q: Tensor, k: Tensor, v: Tensor, shape: ModelShape) -> Tensor:
    groups = shape.num_key_value_heads
    parts = [part.reshape(groups, -1, shape.head_dim, shape.hidden_size) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, shape.hidden_size)


def _split_up(weight: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """Rows (column of the MLP, {gate, up}), so that a shard has whole columns -> gate, up."""
    return weight[0::2], weight[1::2]


def _join_up(gate: Tensor, up: Tensor, shape: ModelShape) -> Tensor:
    return torch.stack([gate, up], dim=1).flatten(0, 1)


_BLOCK = (
    Weight("norm1.weight", width, None, ("input_layernorm.weight",)),
    Weight(
        "attention.qkv.weight",
        lambda s: (
            (s.num_attention_heads + 2 * s.num_key_value_heads) * s.head_dim,
            s.hidden_size,
        ),
        0,
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        _split_qkv,
        _join_qkv,
    ),
    Weight(
        "attention.out.weight",
        lambda s: (s.hidden_size, s.hidden_size),
        1,
        ("self_attn.o_proj.weight",),
    ),
    Weight("norm2.weight", width, None, ("post_attention_layernorm.weight",)),
    Weight(
        "mlp.up.weight",
        lambda s: (2 * s.ffn_hidden_size, s.hidden_size),
        0,
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        _split_up,
        _join_up,
    ),
    Weight(
        "mlp.down.weight",
        lambda s: (s.hidden_size, s.ffn_hidden_size),
        1,
        ("mlp.down_proj.weight",),
    ),
)

_EMBEDDING_AND_NORM = (
    Weight(
        WORD_EMBEDDING,
        vocabulary,
        0,
        ("model.embed_tokens.weight",),
        cut_vocabulary,
        pad_vocabulary,
    ),
    Weight("final_norm.weight", width, None, ("model.norm.weight",)),
)
_OUTPUT = Weight(OUTPUT, vocabulary, 0, ("lm_head.weight",), cut_vocabulary, pad_vocabulary)


def _ends(shape: ModelShape) -> tuple[Weight, ...]:
    return _EMBEDDING_AND_NORM if shape.tied_head else (*_EMBEDDING_AND_NORM, _OUTPUT)


def _refuses(shape: ModelShape) -> str | None:
    if shape.head_dim % 2:
        return (
            f"--architecture llama rotates pairs of channels, but --hidden-size "
            f"{shape.hidden_size} gives {shape.num_attention_heads} heads of odd width "
            f"{shape.head_dim}; change --hidden-size or --num-attention-heads."
        )
    scaled = shape.rotary_scaling != "none"
    if scaled != (shape.rotary_scaling_factor > 1):
        return (
            f"--rotary-scaling {shape.rotary_scaling} with --rotary-scaling-factor "
            f"{shape.rotary_scaling_factor:g}: scaling needs a factor above 1, and a factor needs "
            "--rotary-scaling linear or llama3."
        )
    if (shape.rotary_scaling == "llama3") != (shape.rotary_original_positions is not None):
        return (
            f"--rotary-scaling {shape.rotary_scaling} with --rotary-original-positions "
            f"{shape.rotary_original_positions}: llama3 scaling, and only that, needs the number "
            "of positions the model was trained with before."
        )
    return None


def _normalized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Normalize names to `model.*`; files of old versions also carry the inverse frequencies."""
    return {
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": tensor
        for name, tensor in state.items()
        if not name.endswith("rotary_emb.inv_freq")
    }


def _default_ffn(hidden_size: int) -> int:
    """8/3 of the hidden size, as many weights as GPT-2's MLP, rounded up to 256."""
    return -(-8 * hidden_size // (3 * 256)) * 256


LLAMA = Architecture(
    name="llama",
    block=_BLOCK,
    ends=_ends,
    norm="rms",
    activation="swiglu",
    bias=False,
    rotary=True,
    default_ffn=_default_ffn,
    refuses=_refuses,
    hf=HuggingFace(
        model_type="llama",
        model_class="LlamaForCausalLM",
        block="model.layers.{}",
        read_shape=llama_config.read_shape,
        config=llama_config.config,
        normalized=_normalized,
    ),
)
