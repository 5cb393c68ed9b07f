"""Convert our tokenizers to `transformers` tokenizers, for exported models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eslm.data.tokenizers.base import Tokenizer, byte_characters
from megatron_eslm.data.tokenizers.from_transformers import STORED
from megatron_eslm.data.tokenizers.gpt2 import END_OF_TEXT, GPT2BPETokenizer
from megatron_eslm.data.tokenizers.json_format import HuggingFaceTokenizer, load_rust, make_special
from megatron_eslm.data.tokenizers.kinds import ByteTokenizer, SentencePieceTokenizer
from megatron_eslm.data.tokenizers.samples import RARE, SAMPLES
from megatron_eslm.data.tokenizers.sentencepiece import rust_of_sentencepiece
from megatron_eslm.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


def export_tokenizer(tokenizer: Tokenizer, directory: str | Path, max_length: int) -> None:
    """Write a tokenizer for `AutoTokenizer.from_pretrained(directory)` and verify its ids.

    A SentencePiece model that `transformers` cannot express is stored unchanged in the folder
    `tokenizer/`, from which this package reads it, with a warning. AutoTokenizer then fails instead
    of giving other ids.

    Args:
        tokenizer: tokenizer of the model.
        directory: folder of the exported model, with config.json.
        max_length: number of positions of the model.

    Raises:
        ConfigError: the written tokenizer gives other ids for ordinary text than `tokenizer`.
    """
    from transformers import AutoTokenizer

    directory = Path(directory)
    spelling = hf_tokenizer(tokenizer, max_length)
    if spelling is None:
        tokenizer.save(directory / STORED)
        export_no_tokenizer(directory)
        logger.warning(
            "%s reads text in a way that transformers cannot express, so AutoTokenizer does not "
            "load this export's tokenizer. It is in the folder %s of the export: tools/generate.py "
            "and tools/convert_from_hf.py read it there; sentencepiece reads its tokenizer.model.",
            tokenizer.where,
            STORED,
        )
        return
    spelling.save_pretrained(directory)
    loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)

    def read(text: str) -> list[int]:
        return loaded(text, verbose=False)["input_ids"]  # no warning about long texts

    for text in SAMPLES:
        ours, theirs = tokenizer.encode(text), read(text)
        if ours != theirs:
            raise ConfigError(
                f"{tokenizer.where}: the tokenizer that transformers makes from it gives other ids "
                f"for {text!r} ({theirs[:8]}... instead of {ours[:8]}...), so an exported model "
                "would read text that it was not trained on. Export the model alone with "
                "--without-tokenizer."
            )
    if any(tokenizer.encode(text) != read(text) for text in RARE):
        logger.warning(
            "%s: the exported tokenizer gives the same ids for common text, but other ids for rare "
            "combining characters, which transformers normalizes differently (%s)",
            tokenizer.where,
            tokenizer.normalization,
        )


def export_no_tokenizer(directory: str | Path) -> None:
    """Make AutoTokenizer fail on the folder; without any file it would return empty ids."""
    config = {"tokenizer_class": "NoTokenizerWasExported"}
    (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def hf_tokenizer(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast | None:
    """Build a tokenizer for `save_pretrained` that gives the ids of training for ordinary text.

    It adds no tokens. The end-of-document token is the only special token that the model has seen,
    so it also serves as the begin, end, unknown and padding token. Unlike our tokenizers, it reads
    a special token spelled out in text as that token, as users of `transformers` expect.

    Args:
        tokenizer: tokenizer of the model.
        max_length: maximum text length of the model, in tokens.

    Returns:
        None for a SentencePiece model that `transformers` cannot express.
    """
    from transformers import PreTrainedTokenizerFast

    end = END_OF_TEXT
    rust: RustTokenizer | None
    if isinstance(tokenizer, GPT2BPETokenizer):
        rust = _byte_level(tokenizer.vocab, tokenizer.merges, split=True)
    elif isinstance(tokenizer, ByteTokenizer):
        vocab = {character: byte for byte, character in enumerate(byte_characters())}
        rust = _byte_level({**vocab, END_OF_TEXT: tokenizer.eod}, [], split=False)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        end = tokenizer.eod_token
        rust = load_rust(tokenizer.files["tokenizer.json"])
        make_special(rust, end)
        _add_nothing(rust)
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        end = tokenizer.eod_token
        rust = rust_of_sentencepiece(tokenizer)
        if rust is None:
            return None
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(
    vocab: dict[str, int], merges: list[tuple[str, str]], *, split: bool
) -> RustTokenizer:
    """Build a byte-level BPE; with `split`, it first cuts text into GPT-2's pieces."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as RustTokenizer

    rust = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return rust


def _add_nothing(rust: RustTokenizer) -> None:
    """Remove post-processing that adds begin or end tokens, which training did not have."""
    from tokenizers import processors

    if rust.num_special_tokens_to_add(False):
        rust.post_processor = processors.ByteLevel(trim_offsets=False)  # changes no ids
    rust.no_truncation()
    rust.no_padding()
