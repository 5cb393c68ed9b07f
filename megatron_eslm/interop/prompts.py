"""The texts on which a converted model must agree with its original."""

from __future__ import annotations

from typing import Any

from megatron_eslm.model.shape import ModelShape

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "def area(radius):\n    return 3.14159 * radius ** 2  # in square metres\n",
    "In 1969, 600 million people watched; 2 + 2 = 4, and 12.5% of 80 is 10.",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. Θάλασσα. 風が吹く 🌊",
    '\n\n\t  <p class="x">&amp;</p>\n',
)
"""Prose, code, numbers, other scripts, markup with odd white space."""


def prompts_ids(tokenizer: Any, shape: ModelShape) -> list[list[int]]:
    """Token ids of every stored text and of the edge cases.

    The edges: a single token, the last id of the vocabulary (where cutting and padding would go
    wrong), and exactly as many tokens as the model has positions.
    """
    context = shape.max_position_embeddings
    texts = [ids for text in TEXTS if (ids := list(tokenizer.encode(text)))]
    endless = [i for ids in texts for i in [tokenizer.eod, *ids]] or [tokenizer.eod]
    full = (endless * (context // len(endless) + 1))[:context]
    return [ids[:context] for ids in texts] + [[tokenizer.eod], [shape.vocab_size - 1], full]
