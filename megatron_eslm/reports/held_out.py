"""Documents that a model was not trained on: the validation split of its run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eslm.data.data_options import DEFAULT_SPLIT
from megatron_eslm.data.source import parse_split
from megatron_eslm.reports.token_scores import ScoringModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """How documents were read in training."""

    split: str | None
    """--split whose validation documents are held out; None: all documents, since the run had
    --train-data-path, which is to be another file."""
    eod_mask_loss: bool
    """Whether the first token of each document was excluded from the loss."""


def held_out(models: Sequence[ScoringModel], wanted: str | None) -> HeldOut:
    """Choose the split that defines validation documents: that of the first model's run.

    Warns if a model may have been trained on these documents.

    Args:
        models: all models that score the text; the first one decides.
        wanted: --split, to override the split.

    Raises:
        ConfigError: `wanted` is not a valid split.
    """
    if wanted is not None:
        parse_split(wanted)
    known = [model.weights.data["split"] for model in models if model.weights.data is not None]
    split = wanted or (known[0] if known else DEFAULT_SPLIT)
    taken = f"which --split {split} takes for validation" if split else "all of which is taken"
    for model in {id(model.weights): model for model in models}.values():
        data = model.weights.data
        if data is None:
            logger.warning(
                "%s: with which --split it was trained is not known. The text, %s, may have been "
                "trained on.",
                model.name,
                taken,
            )
        elif data["split"] is None:
            logger.warning(
                "%s was trained on all documents of its --train-data-path: name other files.",
                model.name,
            )
        elif split is None or parse_split(data["split"]) != parse_split(split):
            logger.warning(
                "%s was trained with --split %s. The text, %s, may have been trained on.",
                model.name,
                data["split"],
                taken,
            )
    first = models[0].weights.data or {}
    return HeldOut(split, bool(first.get("eod_mask_loss", False)))
