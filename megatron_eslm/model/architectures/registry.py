"""Find an architecture by our name, by a shape, or by Hugging Face's model type."""

from __future__ import annotations

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.architectures.base import Architecture
from megatron_eslm.model.architectures.gpt2 import GPT2
from megatron_eslm.model.architectures.llama import LLAMA
from megatron_eslm.model.architectures.names import ArchitectureName
from megatron_eslm.model.shape import ModelShape

ARCHITECTURES: dict[ArchitectureName, Architecture] = {"gpt2": GPT2, "llama": LLAMA}


def architecture_of(shape: ModelShape) -> Architecture:
    """The architecture of a shape."""
    return ARCHITECTURES[shape.architecture]


def architecture_of_model_type(model_type: object) -> Architecture:
    """The architecture of config.json's `model_type`.

    Raises:
        ConfigError: none has it.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.hf.model_type == model_type:
            return architecture
    known = " or ".join(repr(each.hf.model_type) for each in ARCHITECTURES.values())
    raise ConfigError(
        f"The Hugging Face model has model_type = {model_type!r}; supported is {known}. Such a "
        "model cannot be converted; use one of a supported architecture."
    )
