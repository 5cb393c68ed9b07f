"""config.json of a Hugging Face GPT-2: schema, supported values, and conversion to our shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.schema import Size, parse_as
from megatron_eslm.model.shape import ModelShape, pad_vocab_size

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

_LARGEST_MULTIPLE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class GPT2Fields:
    """Fields of config.json that affect the computation, with transformers' defaults."""

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
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


def read_fields(config: Any, where: str = "The Hugging Face model's config") -> GPT2Fields:
    """Read and check a configuration.

    Args:
        config: the content of a config.json, or a configuration object of transformers.
        where: the file, for messages.

    Raises:
        ConfigError: wrong types or sizes, or a value that our GPT-2 does not support.
    """
    if hasattr(config, "to_json_string"):
        config = json.loads(config.to_json_string(use_diff=False))
    if not isinstance(config, dict):
        raise ConfigError(f"{where} is not a JSON object. It is damaged; download it again.")
    if config.get("model_type") != "gpt2":
        raise _unsupported("model_type", config.get("model_type"), "'gpt2'", "only GPT-2 is read")
    named = {_OTHER_NAMES.get(name, name): value for name, value in config.items()}
    fields = parse_as(GPT2Fields, {**named, **{n: config[n] for n in named if n in config}}, where)
    _check_supported(fields)
    return fields


def gpt2_shape(fields: GPT2Fields, multiple: int, ids: int | None = None) -> ModelShape:
    """Convert a configuration to our shape.

    Args:
        fields: result of `read_fields`.
        multiple: pad the vocabulary to a multiple of this.
        ids: number of ids of the tokenizer. Embedding rows beyond are padding, which many folders
            have, and not part of the vocabulary. Default: every row is an id.

    Raises:
        ConfigError: a bad multiple, or more ids than rows.
    """
    if not 1 <= multiple <= _LARGEST_MULTIPLE:
        raise ConfigError(
            f"--make-vocab-size-divisible-by {multiple} must be 1 to {_LARGEST_MULTIPLE}; 128 is "
            "usual."
        )
    rows = fields.vocab_size
    ids = rows if ids is None else ids
    if ids > rows:
        raise ConfigError(
            f"The tokenizer has {ids} ids, but the model only {rows} rows of embeddings "
            "(vocab_size in config.json). It is not the tokenizer of this model, or tokens were "
            "added to it and the model was not resized; use the pair that was trained."
        )
    return ModelShape(
        num_layers=fields.n_layer,
        hidden_size=fields.n_embd,
        num_attention_heads=fields.n_head,
        ffn_hidden_size=fields.n_inner or 4 * fields.n_embd,
        max_position_embeddings=fields.n_positions,
        vocab_size=ids,
        padded_vocab_size=pad_vocab_size(ids, multiple),
        layernorm_epsilon=fields.layer_norm_epsilon,
    )


def _check_supported(fields: GPT2Fields) -> None:
    """Raise ConfigError, naming the field, if our GPT-2 does not support a value."""
    if fields.activation_function not in _ACTIVATIONS:
        wanted = " or ".join(map(repr, _ACTIVATIONS))
        raise _unsupported(
            "activation_function", fields.activation_function, wanted, "the MLP uses GELU-tanh"
        )
    for field, (value, reason) in _FIXED_FIELDS.items():
        if getattr(fields, field) != value:
            raise _unsupported(field, getattr(fields, field), json.dumps(value), reason)
    if fields.quantization_config is not None:
        raise _unsupported(
            "quantization_config", "{...}", "none", "weights must be floating-point numbers"
        )
    if fields.n_embd % fields.n_head:
        raise _unsupported(
            "n_head", fields.n_head, f"a divisor of n_embd = {fields.n_embd}", "heads are equal"
        )


def _unsupported(field: str, value: Any, wanted: str, reason: str) -> ConfigError:
    return ConfigError(
        f"The Hugging Face model has {field} = {value!r}; supported is {wanted} ({reason}). "
        "Such a model cannot be converted; use one with the supported setting."
    )
