"""Train a byte-level BPE tokenizer on our own text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_eslm.data.tokenizer_gpt2 import END_OF_TEXT
from megatron_eslm.errors import ConfigError


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Write a byte-level BPE `tokenizer.json` with `<|endoftext|>` (id 0) to `path`.

    The same texts give the same file.

    Raises:
        ConfigError: `vocab_size` leaves no room for the 256 bytes and `<|endoftext|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ConfigError(
            f"A byte-level vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} "
            "need 257."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    temporary = Path(f"{path}.tmp")
    tokenizer.save(str(temporary))
    os.replace(temporary, path)
