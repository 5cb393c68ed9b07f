"""config.json of a Hugging Face GPT-2: schema, supported values, and conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from megatron_eslm.files.schema import Size, parse_as
from megatron_eslm.model.architectures.hf_fields import FIELDS, check_fixed, unsupported
from megatron_eslm.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import GPT2Config

_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
"""transformers' two names for GELU-tanh."""

_FIXED_FIELDS: dict[str, tuple[Any, str]] = {
    "scale_attn_weights": (True, "attention scores are always divided by sqrt(head width)"),
    "scale_attn_by_inverse_layer_idx": (False, "every layer scales its attention alike"),
    "add_cross_attention": (False, "there is no encoder to attend to"),
    "tie_word_embeddings": (True, "the head is the word embedding"),
}
"""Fields that change the computed function -> the supported value, and the reason."""

_OTHER_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""Aliases that transformers accepts for the fields."""


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """Fields of config.json that affect the computation, with transformers' defaults."""

    __pydantic_config__ = FIELDS
    n_layer: Size = 12
    n_embd: Size = 768
    n_head: Size = 12
    n_inner: Size | None = None
    n_positions: Size = 1024
    vocab_size: Size = 50257
    layer_norm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-5
    activation_function: str = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    quantization_config: Any = None


def read_shape(config: dict[str, Any], where: str) -> ModelShape:
    """Convert a config.json; see `architectures.base.HuggingFace.read_shape`."""
    named = {_OTHER_NAMES.get(name, name): value for name, value in config.items()}
    fields = parse_as(_Fields, {**named, **{n: config[n] for n in named if n in config}}, where)
    if fields.activation_function not in _ACTIVATIONS:
        wanted = " or ".join(map(repr, _ACTIVATIONS))
        raise unsupported(
            "activation_function", fields.activation_function, wanted, "the MLP uses GELU-tanh"
        )
    check_fixed(fields, _FIXED_FIELDS)
    if fields.n_embd % fields.n_head:
        raise unsupported(
            "n_head", fields.n_head, f"a divisor of n_embd = {fields.n_embd}", "heads are equal"
        )
    return ModelShape(
        num_layers=fields.n_layer,
        hidden_size=fields.n_embd,
        num_attention_heads=fields.n_head,
        ffn_hidden_size=fields.n_inner or 4 * fields.n_embd,
        max_position_embeddings=fields.n_positions,
        vocab_size=fields.vocab_size,
        padded_vocab_size=fields.vocab_size,
        layernorm_epsilon=fields.layer_norm_epsilon,
    )


def config(shape: ModelShape, eod: int) -> GPT2Config:
    """Build the configuration of `GPT2LMHeadModel`; `eod` begins and ends a text."""
    from transformers import GPT2Config

    default_width = shape.ffn_hidden_size == 4 * shape.hidden_size
    return GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.max_position_embeddings,
        n_embd=shape.hidden_size,
        n_layer=shape.num_layers,
        n_head=shape.num_attention_heads,
        n_inner=None if default_width else shape.ffn_hidden_size,
        activation_function="gelu_new",
        layer_norm_epsilon=shape.layernorm_epsilon,
        # We train without dropout; GPT2Config's default of 0.1 would surprise whoever fine-tunes.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eod,
        eos_token_id=eod,
        architectures=["GPT2LMHeadModel"],
        dtype="float32",
    )
