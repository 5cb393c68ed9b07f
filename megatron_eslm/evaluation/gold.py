"""How probable the right answers are: finer than accuracy where models are small.

Accuracy counts whether the right answer is the most probable one, and is at chance for small
models long before they are alike. Bits per byte of the right answer is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def gold_metrics(task: Any, samples: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the documents of a task whose answers are scored; empty for others.

    Args:
        task: lm-eval's Task.
        samples: lm-eval's log of it.

    Returns:
        `gold_logprob`, the log-probability of the right answer in nats, and `bits_per_byte`, that
        in bits over the bytes of the answer in UTF-8 without its leading blank.
    """
    answers = [found for sample in samples if (found := _gold(task, sample)) is not None]
    if not answers:
        return {}
    return {
        "gold_logprob": sum(log for log, _ in answers) / len(answers),
        "bits_per_byte": sum(-log / math.log(2) / size for log, size in answers) / len(answers),
    }


def _gold(task: Any, sample: Mapping[str, Any]) -> tuple[float, int] | None:
    """Log-probability and bytes of the right answer; the more probable where several are."""
    if task.OUTPUT_TYPE == "loglikelihood":
        numbers = [0]
    elif task.OUTPUT_TYPE == "multiple_choice":
        numbers = _right_ones(task, sample["doc"])
    else:
        return None
    found = []
    for number in numbers:
        answer = sample["arguments"][number][1].strip(" ")
        if answer:
            found.append((sample["filtered_resps"][number][0], len(answer.encode())))
    return max(found, default=None)


def _right_ones(task: Any, doc: Any) -> list[int]:
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    all_gold = gold if isinstance(gold, list) else [gold]
    numbers = [
        choices.index(g) if g in choices else -1 if isinstance(g, str) else g for g in all_gold
    ]
    return [number for number in numbers if 0 <= number < len(choices)]
