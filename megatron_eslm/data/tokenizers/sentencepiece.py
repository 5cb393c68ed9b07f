"""Convert a SentencePiece model to a tokenizer of the `tokenizers` library."""

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
    """Convert a model; None unless the result gives the model's own ids for all samples."""
    try:
        rust = _convert(tokenizer)
        same = all(rust.encode(text).ids == tokenizer.encode(text) for text in SAMPLES)
    except Exception as error:  # treat a failed conversion like one with other ids
        logger.debug("%s: %s", tokenizer.where, error)
        return None
    return rust if same else None


def _convert(tokenizer: SentencePieceTokenizer) -> RustTokenizer:
    """Combine the pieces as transformers reads them with the normalization steps of the model.

    transformers omits some of these steps and adds a begin token to each text.
    """
    from tokenizers import pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        # transformers reads the full file; nothing refers to the folder afterwards.
        shutil.copyfile(tokenizer.files["tokenizer.model"], Path(folder) / "tokenizer.model")
        rust: Any = PreTrainedTokenizerFast.from_pretrained(folder).backend_tokenizer
    spec = tokenizer.normalizer_spec
    rust.normalizer = _normalizer(spec)
    rust.pre_tokenizer = pre_tokenizers.Sequence([])
    rust.post_processor = processors.ByteLevel(trim_offsets=False)  # changes no ids
    rust.decoder = _decoder(spec)
    return rust


def _normalizer(spec: Any) -> Any:
    """SentencePiece's steps in its order: characters, extra spaces, `▁` for spaces, prefix."""
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
