"""Our tokenizers as `transformers` tokenizers, for exported models."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eslm.data.tokenizer_base import Tokenizer, byte_characters
from megatron_eslm.data.tokenizer_gpt2 import END_OF_TEXT, GPT2BPETokenizer
from megatron_eslm.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from megatron_eslm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Texts on which a converted SentencePiece model must agree with the original.
_PROBES = (
    "Hello world",
    " leading and  double   spaces ",
    "def f(x):\n    return x  # tab\there\n\n",
    "naïve café, 漢字, ½ and 🙂",
    "1234567890 1,000.5 -3",
    "",
)


def hf_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer for `save_pretrained` that gives the same ids for ordinary text.

    Unlike ours it reads the characters of a special token in a text as that token, as users of
    `transformers` expect.

    Raises:
        ConfigError: a SentencePiece model that `transformers` cannot express exactly.
    """
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, GPT2BPETokenizer):
        rust = _byte_level(tokenizer.vocab, tokenizer.merges, split=True)
        end = END_OF_TEXT
    elif isinstance(tokenizer, ByteTokenizer):
        vocab = {character: byte for byte, character in enumerate(byte_characters())}
        rust = _byte_level({**vocab, END_OF_TEXT: tokenizer.eod}, [], split=False)
        end = END_OF_TEXT
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        from tokenizers import Tokenizer as RustTokenizer

        rust = RustTokenizer.from_file(str(tokenizer.files["tokenizer.json"]))
        end = tokenizer.eod_token
    else:
        return _from_sentencepiece(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], *, split: bool):
    """A byte-level BPE; `split` cuts the text into GPT-2's pieces first."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as RustTokenizer

    rust = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return rust


def _from_sentencepiece(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The first conversion that gives the ids of the model itself on all probes."""
    model_file = tokenizer.files["tokenizer.model"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(model_file, Path(folder) / "tokenizer.model")
        for convert in (_spm_without_prefix, _spm_with_prefix):
            try:
                # The file is read whole; nothing refers to the folder afterwards.
                converted = convert(folder)
                if all(
                    converted.encode(text, add_special_tokens=False) == tokenizer.encode(text)
                    for text in _PROBES
                ):
                    return converted
            except Exception as error:  # a conversion that fails is one that does not fit
                logger.debug("%s: %s", convert.__name__, error)
    raise ConfigError(
        f"The SentencePiece model {model_file} normalizes text in a way that transformers' "
        "tokenizers do not reproduce (they gave other ids for the same text), so no tokenizer can "
        "be exported with the model. Export without one, or train with a tokenizer.json."
    )


def _spm_without_prefix(folder: str) -> PreTrainedTokenizerFast:
    """transformers' own reading of the file: right for models that add no space in front."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _spm_with_prefix(folder: str) -> PreTrainedTokenizerFast:
    """With a space in front of every text, also of one that begins with a space."""
    from tokenizers import normalizers, pre_tokenizers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    llama = LlamaTokenizer.from_pretrained(folder)
    rust = llama.backend_tokenizer
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rust.pre_tokenizer = pre_tokenizers.Sequence([])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token=llama.bos_token,
        eos_token=llama.eos_token,
        unk_token=llama.unk_token,
        clean_up_tokenization_spaces=False,
    )
