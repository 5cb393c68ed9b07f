"""A SentencePiece model as a tokenizer of the `tokenizers` library."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eslm.data.tokenizers.kinds import SentencePieceTokenizer
from megatron_eslm.data.tokenizers.samples import SAMPLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

logger = logging.getLogger(__name__)

_SPACE = "▁"
"""SentencePiece's character for a space."""


def rust_of_sentencepiece(tokenizer: SentencePieceTokenizer) -> RustTokenizer | None:
    """The conversion of a model if it gives the model's own ids for all samples, else None."""
    try:
        rust = _convert(tokenizer)
        same = all(rust.encode(text).ids == tokenizer.encode(text) for text in SAMPLES)
    except Exception as error:  # a conversion that fails is one that does not fit
        logger.debug("%s: %s", tokenizer.where, error)
        return None
    return rust if same else None


def _convert(tokenizer: SentencePieceTokenizer) -> RustTokenizer:
    """The pieces as transformers reads them, around them the steps that the model names.

    transformers leaves some of these steps out, and adds a begin token to each text.
    """
    from tokenizers import pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        # The file is read whole; nothing refers to the folder afterwards.
        shutil.copyfile(tokenizer.files["tokenizer.model"], Path(folder) / "tokenizer.model")
        rust: Any = PreTrainedTokenizerFast.from_pretrained(folder).backend_tokenizer
    spec = tokenizer.normalizer_spec
    rust.normalizer = _normalizer(spec)
    rust.pre_tokenizer = pre_tokenizers.Sequence([])
    rust.post_processor = processors.ByteLevel(trim_offsets=False)  # changes no ids
    rust.decoder = _decoder(spec)
    return rust


def _normalizer(spec: Any) -> Any:
    """SentencePiece's steps in its order: characters, spaces, a space in front, `▁` for spaces."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps += [normalizers.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), "")]
        steps += [normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.escape_whitespaces:
        steps += [normalizers.Replace(" ", _SPACE)]
    if spec.add_dummy_prefix:
        steps += [normalizers.Prepend(_SPACE if spec.escape_whitespaces else " ")]
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps += [decoders.Strip(content=" ", left=1, right=0)]
    return decoders.Sequence(steps)
