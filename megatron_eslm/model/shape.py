"""The shape of a GPT-2 model, and the paper's four sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import pydantic

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.schema import STRICT, Size

MOST_PADDING = 2**16
"""Limit of vocabulary padding: at most this many rows more than there are ids."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A GPT-2 decoder: pre-norm, learned positions, GELU-tanh, tied head, biases."""

    __pydantic_config__ = STRICT

    num_layers: Size
    hidden_size: Size
    num_attention_heads: Size
    ffn_hidden_size: Size
    max_position_embeddings: Size
    vocab_size: Size
    """Number of real token ids."""
    padded_vocab_size: Size
    """Rows of the embedding; rows from `vocab_size` on get no probability."""
    layernorm_epsilon: Annotated[float, pydantic.Field(ge=0)] = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"--hidden-size {self.hidden_size} is not a multiple of --num-attention-heads "
                f"{self.num_attention_heads}; change one of them."
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
    def num_params_block(self) -> int:
        """Parameters of one transformer block, biases and norms included."""
        d, f = self.hidden_size, self.ffn_hidden_size
        return (3 * d * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d) + 4 * d

    @property
    def num_params_embedding(self) -> int:
        """Word (padded) and position embeddings; the head is tied to the word embedding."""
        return (self.padded_vocab_size + self.max_position_embeddings) * self.hidden_size

    @property
    def num_params(self) -> int:
        """All parameters, the tied head counted once."""
        return (
            self.num_params_embedding
            + self.num_layers * self.num_params_block
            + 2 * self.hidden_size
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain numbers, for run.json."""
        return asdict(self)


def pad_vocab_size(vocab_size: int, multiple: int) -> int:
    """Round `vocab_size` up to a multiple of `multiple` (50257 -> 50304 for 128)."""
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model size with its recipe: defaults of flags under `--model-size`.

    Sources: Table 5 (shapes) and Table 4 (batch, learning rates, warm-up, decay) of the ESLM paper.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int = 1024
    micro_batch_size: int
    gradient_accumulation_steps: int = 40
    lr: float
    min_lr: float = 6e-5
    lr_warmup_iters: int | None = 2000
    lr_decay_iters: int | None = 200_000
    train_iters: int | None = None


PRESETS: dict[str, Preset] = {
    "124M": Preset(
        num_layers=12, hidden_size=768, num_attention_heads=12, micro_batch_size=12, lr=6e-4
    ),
    "350M": Preset(
        num_layers=24, hidden_size=1024, num_attention_heads=16, micro_batch_size=8, lr=6e-4
    ),
    "774M": Preset(
        num_layers=36, hidden_size=1280, num_attention_heads=20, micro_batch_size=8, lr=1e-4
    ),
    "1.5B": Preset(
        num_layers=48, hidden_size=1600, num_attention_heads=25, micro_batch_size=4, lr=1e-4
    ),
}
