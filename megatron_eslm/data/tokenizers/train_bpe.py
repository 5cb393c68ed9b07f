"""Train a byte-level BPE tokenizer on our own text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_eslm.data.tokenizers.base import LARGEST_VOCABULARY, clean_text
from megatron_eslm.data.tokenizers.gpt2 import END_OF_TEXT
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.durable import write_whole


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> int:
    """Write a byte-level BPE `tokenizer.json` with `<|endoftext|>` (id 0) to `path`.

    The same texts give the same file.

    Returns:
        Number of ids: `vocab_size`, or fewer if the texts have no more pairs to merge.

    Raises:
        ConfigError: `vocab_size` is too small for the 256 bytes and `<|endoftext|>` or more than
            is supported; there is no text.
        OSError: `path` cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small for a byte-level vocabulary: 256 bytes and "
            f"{END_OF_TEXT} need 257."
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too large: at most {LARGEST_VOCABULARY} ids are "
            "supported, and typical vocabularies have 8000 to 300000."
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
    tokenizer.train_from_iterator(_some_text(texts), trainer)
    write_whole(Path(path), tokenizer.to_str(pretty=True).encode())
    return tokenizer.get_vocab_size()


def _some_text(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts as valid UTF-8; ConfigError at the end if all were empty."""
    found = False
    for text in texts:
        found = found or bool(text.strip())
        yield clean_text(text)
    if not found:
        raise ConfigError("There is no text to train a tokenizer on; name other input.")
