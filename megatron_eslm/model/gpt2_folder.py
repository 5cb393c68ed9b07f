"""A Hugging Face GPT-2, from memory or a local folder, as our weights and shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt2_names import from_gpt2_state
from megatron_eslm.model.shape import ModelShape, pad_vocab_size

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel

_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
"""transformers' two names of GELU-tanh."""

_FIXED_FIELDS: dict[str, tuple[Any, str]] = {
    "scale_attn_weights": (True, "attention scores are always divided by sqrt(head width)"),
    "scale_attn_by_inverse_layer_idx": (False, "every layer scales its attention alike"),
    "add_cross_attention": (False, "there is no encoder to attend to"),
    "tie_word_embeddings": (True, "the head is the word embedding"),
}
"""Fields of GPT2Config that change the function computed -> the value ours has, and why."""


def from_gpt2(
    model_or_state_dict: Any, config: GPT2Config, multiple: int
) -> tuple[dict[str, Tensor], ModelShape]:
    """A Hugging Face GPT-2 as our state dict and shape.

    Args:
        model_or_state_dict: `GPT2LMHeadModel`, `GPT2Model` or a state dict of either, any floating
            type; not changed and not shared.
        config: its configuration.
        multiple: the vocabulary is padded with zero rows to a multiple of this.

    Returns:
        float32 weights under our names, and their shape.

    Raises:
        ConfigError: an architecture, field or tensor that our GPT-2 does not have.
    """
    shape = gpt2_shape(config, multiple)
    if isinstance(model_or_state_dict, torch.nn.Module):
        model_or_state_dict = model_or_state_dict.state_dict()
    return from_gpt2_state(_without_head(model_or_state_dict), shape), shape


def gpt2_shape(config: GPT2Config, multiple: int) -> ModelShape:
    """The shape that a configuration describes, its vocabulary padded to `multiple`.

    Raises:
        ConfigError: our GPT-2 does not compute what the configuration says.
    """
    check_config(config)
    if multiple < 1:
        raise ConfigError(
            f"--make-vocab-size-divisible-by {multiple} must be 1 or more; 128 is usual."
        )
    return ModelShape(
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        num_attention_heads=config.n_head,
        ffn_hidden_size=config.n_inner or 4 * config.n_embd,
        max_position_embeddings=config.n_positions,
        vocab_size=config.vocab_size,
        padded_vocab_size=pad_vocab_size(config.vocab_size, multiple),
        layernorm_epsilon=config.layer_norm_epsilon,
    )


def check_config(config: Any) -> None:
    """Raise ConfigError, naming the field, if our GPT-2 does not compute what `config` says."""
    if config.model_type != "gpt2":
        raise _unsupported("model_type", config.model_type, "'gpt2'", "only GPT-2 is read")
    if config.activation_function not in _ACTIVATIONS:
        wanted = " or ".join(map(repr, _ACTIVATIONS))
        raise _unsupported(
            "activation_function", config.activation_function, wanted, "the MLP uses GELU-tanh"
        )
    for field, (value, reason) in _FIXED_FIELDS.items():
        if getattr(config, field, value) != value:
            raise _unsupported(field, getattr(config, field), json.dumps(value), reason)
    if getattr(config, "quantization_config", None) is not None:
        raise _unsupported(
            "quantization_config", "{...}", "none", "weights must be floating-point numbers"
        )


def read_gpt2_config(directory: str | Path) -> GPT2Config:
    """The configuration in a local folder, without reading any weights.

    Raises:
        ConfigError: no such folder, or another architecture.
    """
    from transformers import GPT2Config

    _check_folder(Path(directory))
    return GPT2Config.from_pretrained(directory, local_files_only=True)


def load_gpt2(directory: str | Path) -> GPT2LMHeadModel:
    """Load a local folder (one file or shards) as float32 `GPT2LMHeadModel`, evaluation mode.

    Raises:
        ConfigError: no such folder, another architecture, missing or damaged files.
    """
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as hf_logging

    directory = Path(directory)
    _check_folder(directory)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    loader: Any = GPT2LMHeadModel.from_pretrained  # typed for the call without loading info
    try:
        model, report = loader(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # many libraries read here, each with errors of its own
        raise ConfigError(
            f"The Hugging Face model in {directory} cannot be loaded: {error} "
            "Files are missing or damaged; download or export it again."
        ) from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    # transformers fills what is missing with random numbers and only warns.
    absent = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise ConfigError(
            f"The Hugging Face model in {directory} lacks {absent[0]} ({len(absent)} in all) or "
            "has it in another size. Files are missing or belong to another model; get it again."
        )
    return model.eval()


def _check_folder(directory: Path) -> None:
    """A local folder with a readable config.json that says GPT-2."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{directory} is not a Hugging Face model: it has no config.json. Give a local folder "
            "that holds config.json, the weights and the tokenizer."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. The file is damaged; get it again."
        ) from error
    if model_type != "gpt2":
        raise _unsupported("model_type", model_type, "'gpt2'", "only GPT-2 is read")


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under `transformer.*` names, the tied head checked and left out."""
    # GPT2Model and the first published GPT-2 files have no prefix; old files also carry the causal
    # masks as `attn.bias` and `attn.masked_bias`.
    named = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in state.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    head = named.pop("lm_head.weight", None)
    words = named.get("transformer.wte.weight")
    if head is not None and words is not None and not torch.equal(head, words):
        raise ConfigError(
            "The Hugging Face model has an untied head: lm_head.weight is not "
            "transformer.wte.weight. Here the head is the word embedding, so such a model cannot "
            "be converted; use one with tie_word_embeddings."
        )
    return named


def _unsupported(field: str, value: Any, wanted: str, reason: str) -> ConfigError:
    return ConfigError(
        f"The Hugging Face model has {field} = {value!r}; supported is {wanted} ({reason}). "
        "Such a model cannot be converted; use one with the supported setting."
    )
