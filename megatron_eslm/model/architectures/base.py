"""The description of an architecture, from which everything else follows.

Parameters, FLOPs, memory, initial values, shards, checkpoints and the Hugging Face conversion read
one table of weights per architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORD_EMBEDDING = "embedding.word.weight"
OUTPUT = "output.weight"
PADDED = (WORD_EMBEDDING, OUTPUT)
"""Weights with one row per padded id; their padding depends on the layout."""

Size = Callable[[ModelShape], tuple[int, ...]]


def unchanged(tensor: Tensor, shape: ModelShape) -> Tensor:
    """Both sides store the weight alike."""
    return tensor


@dataclass(frozen=True)
class Weight:
    """One parameter: its size, how it is sharded, and its place in the Hugging Face model."""

    name: str
    """Name in GPT; within a block, the part after `blocks.{i}.`."""
    size: Size
    sharded: int | None = None
    """Dimension that is sharded over tensor-parallel ranks."""
    hf: tuple[str, ...] = ()
    """Names in the Hugging Face model; one weight may be stored as several tensors."""
    export: Callable[[Tensor, ModelShape], tuple[Tensor, ...] | Tensor] = unchanged
    """Ours -> theirs: a tensor, or one per name."""
    load: Callable[..., Tensor] = unchanged
    """Theirs (one tensor per name, then the shape) -> ours."""

    def within(self, block: int, hf_block: str) -> Weight:
        """The weight of one block, with full names."""
        theirs = tuple(f"{hf_block.format(block)}.{name}" for name in self.hf)
        return replace(self, name=f"blocks.{block}.{self.name}", hf=theirs)

    def numel(self, shape: ModelShape, tp: int = 1) -> int:
        """Elements per tensor-parallel rank."""
        total = math.prod(self.size(shape))
        return total if self.sharded is None else total // tp


@dataclass(frozen=True)
class HuggingFace:
    """The Hugging Face counterpart of an architecture."""

    model_type: str
    """`model_type` in config.json."""
    model_class: str
    """Class in transformers."""
    block: str
    """Prefix of a block's tensors, with {} for its number."""
    read_shape: Callable[[dict[str, Any], str], ModelShape]
    """Read config.json, named by the second argument: the shape, every embedding row an id.
    ConfigError if a field is not supported."""
    config: Callable[[ModelShape, int], PretrainedConfig]
    """The configuration of a shape, given the end-of-document id."""
    normalized: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    """Undo differences between published files: prefixes, buffers."""


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer's block and ends."""

    name: str
    block: tuple[Weight, ...]
    """Weights of a block."""
    ends: Callable[[ModelShape], tuple[Weight, ...]]
    """Weights of embedding, final norm and head."""
    norm: Literal["layer", "rms"]
    activation: Literal["gelu", "swiglu"]
    bias: bool
    """Whether linear layers have biases."""
    rotary: bool
    """Rotary positions; otherwise learned ones."""
    default_ffn: Callable[[int], int]
    """Hidden size -> default width inside the MLP."""
    refuses: Callable[[ModelShape], str | None]
    """Why a shape is not supported, and the remedy; None if it is."""
    hf: HuggingFace

    def check(self, shape: ModelShape) -> None:
        """Raise ConfigError if the architecture does not support the shape."""
        if refusal := self.refuses(shape):
            raise ConfigError(refusal)

    def linears(self, shape: ModelShape) -> tuple[Weight, ...]:
        """The weights of a block's linear layers."""
        return tuple(weight for weight in self.block if len(weight.size(shape)) == 2)

    def num_weights(self, shape: ModelShape) -> int:
        """Number of parameters (tensors)."""
        return len(self.ends(shape)) + shape.num_layers * len(self.block)

    def weights(self, shape: ModelShape) -> Iterator[Weight]:
        """All parameters, with full names."""
        yield from self.ends(shape)
        for number in range(shape.num_layers):
            for weight in self.block:
                yield weight.within(number, self.hf.block)


def numel(weights: Iterable[Weight], shape: ModelShape, tp: int = 1) -> int:
    """Elements of all weights, per tensor-parallel rank."""
    return sum(weight.numel(shape, tp) for weight in weights)


def width(shape: ModelShape) -> tuple[int, ...]:
    """Size of a vector over the hidden dimension."""
    return (shape.hidden_size,)


def cut_vocabulary(weight: Tensor, shape: ModelShape) -> Tensor:
    """[padded ids, D] -> [ids, D]."""
    return weight[: shape.vocab_size]


def pad_vocabulary(weight: Tensor, shape: ModelShape) -> Tensor:
    """[ids, D] -> [padded ids, D], with zeros."""
    return F.pad(weight, (0, 0, 0, shape.padded_vocab_size - shape.vocab_size))


def vocabulary(shape: ModelShape) -> tuple[int, ...]:
    """Size of embedding and head."""
    return (shape.padded_vocab_size, shape.hidden_size)
