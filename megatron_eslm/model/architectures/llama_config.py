"""config.json of a Hugging Face Llama: schema, supported values, and conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from megatron_eslm.files.schema import Size, parse_as
from megatron_eslm.model.architectures.hf_fields import FIELDS, check_fixed, unsupported
from megatron_eslm.model.rotary import LLAMA3_HIGH, LLAMA3_LOW
from megatron_eslm.model.shape import ModelShape, RotaryScalingName

if TYPE_CHECKING:
    from transformers import LlamaConfig

_FIXED_FIELDS: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the MLP is SwiGLU"),
    "attention_bias": (False, "linear layers have no biases"),
    "mlp_bias": (False, "linear layers have no biases"),
}
"""Fields that change the computed function -> the supported value, and the reason."""

_SCALINGS: dict[str, RotaryScalingName] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
}
_Positive = Annotated[float, pydantic.Field(gt=0, strict=False)]


@dataclass(frozen=True, kw_only=True)
class _Rope:
    """`rope_parameters`, or `rope_scaling` of older files."""

    __pydantic_config__ = FIELDS
    rope_type: str = "default"
    rope_theta: _Positive | None = None
    factor: _Positive = 1.0
    low_freq_factor: _Positive = LLAMA3_LOW
    high_freq_factor: _Positive = LLAMA3_HIGH
    original_max_position_embeddings: Size | None = None


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """Fields of config.json that affect the computation, with transformers' defaults."""

    __pydantic_config__ = FIELDS
    num_hidden_layers: Size = 32
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size = 2048
    vocab_size: Size = 32000
    rms_norm_eps: Annotated[float, pydantic.Field(gt=0)] = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: _Positive = 10000.0
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    quantization_config: Any = None


def read_shape(config: dict[str, Any], where: str) -> ModelShape:
    """Convert a config.json; see `architectures.base.HuggingFace.read_shape`."""
    fields = parse_as(_Fields, config, where)
    check_fixed(fields, _FIXED_FIELDS)
    heads = fields.num_attention_heads
    if fields.hidden_size % heads:
        raise unsupported(
            "num_attention_heads",
            heads,
            f"a divisor of hidden_size = {fields.hidden_size}",
            "heads are equal",
        )
    if fields.head_dim not in (None, fields.hidden_size // heads):
        raise unsupported(
            "head_dim", fields.head_dim, str(fields.hidden_size // heads), "hidden_size / heads"
        )
    raw = dict(fields.rope_parameters or fields.rope_scaling or {})
    if "type" in raw and "rope_type" not in raw:  # the name in the oldest files
        raw["rope_type"] = raw["type"]
    rope = parse_as(_Rope, raw, f"{where}: rope parameters")
    if rope.rope_type not in _SCALINGS:
        wanted = ", ".join(map(repr, _SCALINGS))
        raise unsupported("rope_type", rope.rope_type, wanted, "rotary frequencies")
    scaling = _SCALINGS[rope.rope_type]
    if scaling == "llama3" and (
        (rope.low_freq_factor, rope.high_freq_factor) != (LLAMA3_LOW, LLAMA3_HIGH)
    ):
        raise unsupported(
            "low_freq_factor and high_freq_factor",
            (rope.low_freq_factor, rope.high_freq_factor),
            f"{LLAMA3_LOW:g} and {LLAMA3_HIGH:g}",
            "the values of all published Llama 3 models",
        )
    return ModelShape(
        architecture="llama",
        num_layers=fields.num_hidden_layers,
        hidden_size=fields.hidden_size,
        num_attention_heads=heads,
        num_query_groups=fields.num_key_value_heads,
        ffn_hidden_size=fields.intermediate_size,
        max_position_embeddings=fields.max_position_embeddings,
        vocab_size=fields.vocab_size,
        padded_vocab_size=fields.vocab_size,
        layernorm_epsilon=fields.rms_norm_eps,
        tied_head=fields.tie_word_embeddings,
        rotary_base=fields.rope_theta if rope.rope_theta is None else rope.rope_theta,
        rotary_scaling=scaling,
        rotary_scaling_factor=1.0 if scaling == "none" else rope.factor,
        rotary_original_positions=(
            rope.original_max_position_embeddings if scaling == "llama3" else None
        ),
    )


def config(shape: ModelShape, eod: int) -> LlamaConfig:
    """Build the configuration of `LlamaForCausalLM`; `eod` begins and ends a text."""
    from transformers import LlamaConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rotary_base}
    if shape.rotary_scaling != "none":
        rope |= {"rope_type": shape.rotary_scaling, "factor": shape.rotary_scaling_factor}
    if shape.rotary_scaling == "llama3":
        rope |= {
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": shape.rotary_original_positions,
        }
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        rms_norm_eps=shape.layernorm_epsilon,
        tie_word_embeddings=shape.tied_head,
        rope_parameters=rope,
        bos_token_id=eod,
        eos_token_id=eod,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
