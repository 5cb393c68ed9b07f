"""Sample texts that expose differences between tokenizers and changes to text."""

from __future__ import annotations

import logging

from megatron_eslm.data.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

SAMPLES = (
    "The riskiest tokens of a sequence aren't always the rarest: 3.14159, 2048 and 007 are not.",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # \t tabs\n\n",
    "Überraschend naïve façade — 東京 привет \u00a0 \U0001f642 \\frac{a}{b}",
    " leading and  double   spaces ",
    "½ ﬁ Ａ x² 1,000.5 -3",
    "x",
    "",
)
"""Words, digits, spaces, code, accents, other scripts, an emoji, compatibility characters."""

RARE = ("ẛ\u0323", "o\u0302\u0301 a\u0323\u0302", "\ufdfa \u1100\u1161")
"""Sequences of combining characters on which normalizers differ."""

_SMALL = ("a  b", " a", "a\n\tb", "½", "é", "e\u0301", "字", "🙂", "A")


def changes(tokenizer: Tokenizer) -> dict[str, str]:
    """Map each small text that encoding and decoding changes to its changed form."""
    back = {text: tokenizer.decode(tokenizer.encode(text)) for text in _SMALL}
    # Some libraries decode the first word with a leading space, which loses nothing.
    return {text: after for text, after in back.items() if after not in (text, f" {text}")}


def warn_of_changes(tokenizer: Tokenizer) -> None:
    """Log a warning if this tokenizer does not preserve text."""
    changed = changes(tokenizer)
    if not changed:
        return
    shown = ", ".join(f"{text!r} becomes {after!r}" for text, after in list(changed.items())[:4])
    logger.warning(
        "%s does not preserve text (%s): %s. The model learns the changed text. To preserve it, "
        "use a byte-level tokenizer, or a SentencePiece model that was trained with "
        "normalization_rule_name=identity, remove_extra_whitespaces=false and byte_fallback=true.",
        tokenizer.where,
        tokenizer.normalization or "it lacks characters",
        shown,
    )
