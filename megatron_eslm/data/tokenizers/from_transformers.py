"""Read the tokenizer of a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path

from megatron_eslm.data.tokenizers.base import META_FILE
from megatron_eslm.data.tokenizers.build import (
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_eslm.errors import ConfigError

STORED = "tokenizer"
"""Subfolder of an exported model for a tokenizer that `transformers` cannot express."""


def folder_tokenizer(directory: str | Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder.

    Raises:
        ConfigError: the folder has neither tokenizer.json, nor vocab.json with merges.txt, nor a
            tokenizer stored by this package.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(directory)
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return GPT2BPETokenizer(vocab, merges)
    if (directory / STORED / META_FILE).is_file():
        return load_tokenizer(directory / STORED)
    raise ConfigError(
        f"{directory} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is "
        "there. Put the model's tokenizer beside its weights."
    )
