"""The shape of a model: its architecture and sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import pydantic

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.schema import STRICT, Size
from megatron_eslm.model.architectures.names import ArchitectureName

MOST_PADDING = 2**16
"""Limit of vocabulary padding: at most this many rows more than there are ids."""


RotaryScalingName = Literal["none", "linear", "llama3"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer: its architecture (model/architectures/) and sizes."""

    __pydantic_config__ = STRICT

    architecture: ArchitectureName = "gpt2"
    num_layers: Size
    hidden_size: Size
    num_attention_heads: Size
    num_query_groups: Size | None = None
    """Key-value heads, each shared by a group of query heads; None if every query head has one."""
    ffn_hidden_size: Size
    max_position_embeddings: Size
    vocab_size: Size
    """Number of real token ids."""
    padded_vocab_size: Size
    """Rows of the embedding; rows from `vocab_size` on get no probability."""
    layernorm_epsilon: Annotated[float, pydantic.Field(ge=0)] = 1e-5
    tied_head: bool = True
    """Whether the head is the word embedding."""
    rotary_base: Annotated[float, pydantic.Field(gt=1)] = 10000.0
    """Base of the rotary frequencies; architectures with learned positions ignore all of these."""
    rotary_scaling: RotaryScalingName = "none"
    rotary_scaling_factor: Annotated[float, pydantic.Field(ge=1)] = 1.0
    rotary_original_positions: Size | None = None
    """Positions of the model before scaling (llama3)."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"--hidden-size {self.hidden_size} is not a multiple of --num-attention-heads "
                f"{self.num_attention_heads}; change one of them."
            )
        if self.num_query_groups == self.num_attention_heads:  # two spellings would be unequal
            object.__setattr__(self, "num_query_groups", None)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"--num-attention-heads {self.num_attention_heads} is not a multiple of "
                f"--num-query-groups {self.num_query_groups}; change one of them."
            )
        if self.padded_vocab_size < self.vocab_size:
            raise ConfigError(
                f"The padded vocabulary ({self.padded_vocab_size}) is smaller than the "
                f"vocabulary ({self.vocab_size})."
            )
        if self.padded_vocab_size > 2 * self.vocab_size + MOST_PADDING:
            raise ConfigError(
                f"The vocabulary of {self.vocab_size} ids would be padded to "
                f"{self.padded_vocab_size} rows. Lower --make-vocab-size-divisible-by; the number "
                "of rows is a multiple of it."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_query_groups or self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain numbers, for run.json."""
        return asdict(self)


def pad_vocab_size(vocab_size: int, multiple: int) -> int:
    """Round `vocab_size` up to a multiple of `multiple` (50257 -> 50304 for 128)."""
    return -(-vocab_size // multiple) * multiple
