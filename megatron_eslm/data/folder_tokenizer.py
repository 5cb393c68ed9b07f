"""The tokenizer that lies beside a Hugging Face model."""

from __future__ import annotations

from pathlib import Path

from megatron_eslm.data.tokenizers import Tokenizer, build_tokenizer
from megatron_eslm.errors import ConfigError


def folder_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder as one of ours.

    Raises:
        ConfigError: the folder has neither tokenizer.json nor vocab.json with merges.txt.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(directory))
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return build_tokenizer("GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))
    raise ConfigError(
        f"{directory} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is "
        "there. Put the model's tokenizer beside its weights."
    )
