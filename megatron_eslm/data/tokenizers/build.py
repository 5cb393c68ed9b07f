"""Build tokenizers from flags, or load them from where they are stored beside data and models."""

from __future__ import annotations

from pathlib import Path

from megatron_eslm.data.hub import TOKENIZER_FILES, model_folder
from megatron_eslm.data.meta import TokenizerMetadata
from megatron_eslm.data.tokenizers.base import META_FILE, Tokenizer
from megatron_eslm.data.tokenizers.gpt2 import GPT2BPETokenizer
from megatron_eslm.data.tokenizers.json_format import HuggingFaceTokenizer
from megatron_eslm.data.tokenizers.kinds import ByteTokenizer, SentencePieceTokenizer
from megatron_eslm.data.tokenizers.samples import SAMPLES
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.schema import read_as

__all__ = [
    "ByteTokenizer",
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "same_ids",
]

_NEEDS: dict[str, tuple[str, ...]] = {
    "GPT2BPETokenizer": ("--vocab-file", "--merge-file"),
    "SentencePieceTokenizer": ("--tokenizer-model",),
    "HuggingFaceTokenizer": ("--tokenizer-model",),
    "ByteTokenizer": (),
}


def build_tokenizer(
    tokenizer_type: str,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    tokenizer_model: str | None = None,
) -> Tokenizer:
    """Build the tokenizer that the flags describe.

    Raises:
        ConfigError: the type is unknown, a flag that it needs is missing, a flag that it does not
            support is given, or a file cannot be used.
    """
    if tokenizer_type not in _NEEDS:
        raise ConfigError(
            f"--tokenizer-type {tokenizer_type} is unknown; choose one of {', '.join(_NEEDS)}."
        )
    given = {
        "--vocab-file": vocab_file,
        "--merge-file": merge_file,
        "--tokenizer-model": tokenizer_model,
    }
    for flag, value in given.items():
        if value is None and flag in _NEEDS[tokenizer_type]:
            raise ConfigError(
                f"--tokenizer-type {tokenizer_type} needs {flag}, which is not given."
            )
        if value is not None and flag not in _NEEDS[tokenizer_type]:
            raise ConfigError(
                f"{flag} {value} has no effect with --tokenizer-type {tokenizer_type}; leave it "
                "out or choose another type."
            )
    if tokenizer_type == "GPT2BPETokenizer":
        assert vocab_file is not None and merge_file is not None
        return GPT2BPETokenizer(vocab_file, merge_file)
    if tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    assert tokenizer_model is not None
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(tokenizer_model)
    folder = model_folder("--tokenizer-model", tokenizer_model, TOKENIZER_FILES)
    return HuggingFaceTokenizer(folder)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load the tokenizer that `Tokenizer.save` stored in `directory`.

    Raises:
        ConfigError: there is none, or its files have changed since they were stored.
    """
    directory = Path(directory)
    stored = _read_metadata(directory / META_FILE)
    kind = stored.type
    tokenizer: Tokenizer
    if kind == "GPT2BPETokenizer":
        tokenizer = GPT2BPETokenizer(
            directory / "vocab.json", directory / "merges.txt", checked=True
        )
    elif kind == "SentencePieceTokenizer":
        tokenizer = SentencePieceTokenizer(directory / "tokenizer.model")
    elif kind == "HuggingFaceTokenizer":
        tokenizer = HuggingFaceTokenizer(
            directory / "tokenizer.json", eod_token=stored.extra.get("eod_token")
        )
    elif kind == "ByteTokenizer":
        tokenizer = ByteTokenizer()
    else:
        raise ConfigError(f"{directory / META_FILE} names the unknown tokenizer type {kind!r}.")
    if tokenizer.identity != stored.identity:
        raise ConfigError(
            f"The tokenizer files in {directory} are not those that were stored (identity "
            f"{tokenizer.identity[:12]}, stored {stored.identity[:12]}). Put the original "
            "files back."
        )
    return tokenizer


def _read_metadata(path: Path) -> TokenizerMetadata:
    otherwise = "name the tokenizer with --tokenizer-type and its files."
    try:
        return read_as(TokenizerMetadata, path)
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} has no stored tokenizer: {path.name} is missing. Preprocess the "
            f"data again, or {otherwise}"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{error} Preprocess the data again, or {otherwise}") from error


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids, even if built from different files.

    Equal file contents are sufficient. Otherwise (for example GPT-2's merges.txt and a
    tokenizer.json made from it), vocabulary size, end-of-document id and the ids of various sample
    texts must agree.
    """
    if a.identity == b.identity:
        return True
    return (a.vocab_size, a.eod) == (b.vocab_size, b.eod) and all(
        a.encode(text) == b.encode(text) for text in (*SAMPLES, "<|endoftext|>")
    )
