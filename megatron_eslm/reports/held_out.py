"""Which documents a model was not trained on: the validation split of the run that made it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eslm.data.source import parse_split
from megatron_eslm.reports.token_scores import ScoringModel

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = "98,1,1"
"""That of runs whose checkpoint does not tell, as `pretrain_gpt.py` has it."""


@dataclass(frozen=True)
class HeldOut:
    """How documents were read in training."""

    split: str
    eod_mask_loss: bool
    """Whether a document's first token was in no loss."""


def held_out(models: Sequence[ScoringModel], wanted: str | None) -> HeldOut:
    """The split to take validation documents by: that of the first model's run.

    Whatever of the text a model may have been trained on is said in the log.

    Args:
        models: all that score the text, the one that decides first.
        wanted: --split, to take another one on purpose.

    Raises:
        ConfigError: `wanted` is no split.
    """
    if wanted is not None:
        parse_split(wanted)
    known = [model.weights.data["split"] for model in models if model.weights.data is not None]
    split = wanted or (known[0] if known else DEFAULT_SPLIT)
    for model in {id(model.weights): model for model in models}.values():
        data = model.weights.data
        if data is None:
            logger.warning(
                "%s: with which --split it was trained is not known. The text, which --split %s "
                "takes for validation, may have been trained on.",
                model.name,
                split,
            )
        elif parse_split(data["split"]) != parse_split(split):
            logger.warning(
                "%s was trained with --split %s. The text, which --split %s takes for validation, "
                "may have been trained on.",
                model.name,
                data["split"],
                split,
            )
    first = models[0].weights.data or {}
    return HeldOut(split, bool(first.get("eod_mask_loss", False)))
