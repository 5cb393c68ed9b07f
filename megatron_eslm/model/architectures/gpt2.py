"""GPT-2: pre-norm, learned positions, GELU (tanh form), biases, tied head.

Shape legend: D hidden size, F MLP width, H heads, K head width (D = H * K), P positions.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_eslm.model.architectures import gpt2_config
from megatron_eslm.model.architectures.base import (
    WORD_EMBEDDING,
    Architecture,
    HuggingFace,
    Size,
    Weight,
    cut_vocabulary,
    pad_vocabulary,
    unchanged,
    vocabulary,
    width,
)
from megatron_eslm.model.shape import ModelShape


def _transposed(tensor: Tensor, shape: ModelShape) -> Tensor:
    """A linear layer [out, in] <-> transformers' Conv1D [in, out]; its own inverse."""
    return tensor.t()


def _heads_to_thirds(rows: Tensor, shape: ModelShape) -> Tensor:
    """Reorder rows from (head, q|k|v, K), megatron-core's order, to (q|k|v, head, K)."""
    split = rows.reshape(shape.num_attention_heads, 3, shape.head_dim, *rows.shape[1:])
    return split.transpose(0, 1).reshape(rows.shape)


def _thirds_to_heads(rows: Tensor, shape: ModelShape) -> Tensor:
    """Reorder rows from (q|k|v, head, K) to (head, q|k|v, K)."""
    split = rows.reshape(3, shape.num_attention_heads, shape.head_dim, *rows.shape[1:])
    return split.transpose(0, 1).reshape(rows.shape)


def _qkv_out(weight: Tensor, shape: ModelShape) -> Tensor:
    return _heads_to_thirds(weight, shape).t()


def _qkv_in(weight: Tensor, shape: ModelShape) -> Tensor:
    return _thirds_to_heads(weight.t(), shape)


def _linear(
    name: str, hf: str, size: Size, sharded: int, *, qkv: bool = False
) -> tuple[Weight, Weight]:
    """A linear layer's weight and bias; the bias of a row-parallel layer is not sharded."""
    weight = Weight(
        f"{name}.weight",
        size,
        sharded,
        (f"{hf}.weight",),
        _qkv_out if qkv else _transposed,
        _qkv_in if qkv else _transposed,
    )
    bias = Weight(
        f"{name}.bias",
        lambda s: size(s)[:1],
        None if sharded else 0,
        (f"{hf}.bias",),
        _heads_to_thirds if qkv else unchanged,
        _thirds_to_heads if qkv else unchanged,
    )
    return weight, bias


def _norm(name: str, hf: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{name}.weight", width, None, (f"{hf}.weight",)),
        Weight(f"{name}.bias", width, None, (f"{hf}.bias",)),
    )


_BLOCK = (
    *_norm("norm1", "ln_1"),
    *_linear(
        "attention.qkv",
        "attn.c_attn",
        lambda s: (3 * s.hidden_size, s.hidden_size),
        0,
        qkv=True,
    ),
    *_linear("attention.out", "attn.c_proj", lambda s: (s.hidden_size, s.hidden_size), 1),
    *_norm("norm2", "ln_2"),
    *_linear("mlp.up", "mlp.c_fc", lambda s: (s.ffn_hidden_size, s.hidden_size), 0),
    *_linear("mlp.down", "mlp.c_proj", lambda s: (s.hidden_size, s.ffn_hidden_size), 1),
)

_ENDS = (
    Weight(
        WORD_EMBEDDING,
        vocabulary,
        0,
        ("transformer.wte.weight",),
        cut_vocabulary,
        pad_vocabulary,
    ),
    Weight(
        "embedding.position.weight",
        lambda s: (s.max_position_embeddings, s.hidden_size),
        None,
        ("transformer.wpe.weight",),
    ),
    *_norm("final_norm", "transformer.ln_f"),
)


def _refuses(shape: ModelShape) -> str | None:
    for flag, is_set in (
        ("--num-query-groups", shape.num_key_value_heads != shape.num_attention_heads),
        ("--untie-embeddings-and-output-weights", not shape.tied_head),
        ("--rotary-base", shape.rotary_base != ModelShape.rotary_base),
        ("--rotary-scaling", shape.rotary_scaling != "none"),
        ("--rotary-scaling-factor", shape.rotary_scaling_factor != 1),
        ("--rotary-original-positions", shape.rotary_original_positions is not None),
    ):
        if is_set:
            return (
                f"{flag} with --architecture gpt2: GPT-2 has a key-value head per query head, "
                "learned positions and a tied head. Use --architecture llama, or leave it out."
            )
    return None


def _normalized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Normalize names to `transformer.*`.

    GPT2Model and the first published GPT-2 files have no prefix; old files also carry the causal
    masks as `attn.bias` and `attn.masked_bias`.
    """
    return {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in state.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


GPT2 = Architecture(
    name="gpt2",
    block=_BLOCK,
    ends=lambda shape: _ENDS,
    norm="layer",
    activation="gelu",
    bias=True,
    rotary=False,
    default_ffn=lambda hidden_size: 4 * hidden_size,
    refuses=_refuses,
    hf=HuggingFace(
        model_type="gpt2",
        model_class="GPT2LMHeadModel",
        block="transformer.h.{}",
        read_shape=gpt2_config.read_shape,
        config=gpt2_config.config,
        normalized=_normalized,
    ),
)
