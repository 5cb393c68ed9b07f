"""Short texts on which tokenizers show how they differ, and what one does to text."""

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
"""Combining characters in orders and pairs that normalizers differ in."""

_SMALL = ("a  b", " a", "a\n\tb", "½", "é", "e\u0301", "字", "🙂", "A")


def changes(tokenizer: Tokenizer) -> dict[str, str]:
    """Small texts that come back from ids changed, each with what it became."""
    back = {text: tokenizer.decode(tokenizer.encode(text)) for text in _SMALL}
    # A space in front is how some libraries decode the first word; it loses nothing.
    return {text: after for text, after in back.items() if after not in (text, f" {text}")}


def warn_of_changes(tokenizer: Tokenizer) -> None:
    """One line in the log if what this tokenizer keeps of a text is not the text."""
    changed = changes(tokenizer)
    if not changed:
        return
    shown = ", ".join(f"{text!r} becomes {after!r}" for text, after in list(changed.items())[:4])
    logger.warning(
        "%s does not keep text as it is (%s): %s. The model learns the changed text. To keep it, "
        "use a byte-level tokenizer, or a SentencePiece model that was trained with "
        "normalization_rule_name=identity, remove_extra_whitespaces=false and byte_fallback=true.",
        tokenizer.where,
        tokenizer.normalization or "it lacks characters",
        shown,
    )
