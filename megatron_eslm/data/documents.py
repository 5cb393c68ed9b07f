"""Where documents of a sequence begin, so that attention and positions can stay inside them.

Flags: --reset-attention-mask and --reset-position-ids, Megatron-LM's names. A document ends with
its end-of-document token, which still belongs to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_eslm.data.data_options import DataOptions


@dataclass(frozen=True)
class DocumentRules:
    """What documents change in the model."""

    eod: int
    """The end-of-document id."""
    reset_attention_mask: bool = False
    """Positions attend to their own document only."""
    reset_position_ids: bool = False
    """Positions count from the beginning of their document."""

    def of(self, tokens_MU: torch.Tensor) -> MaskAndPositions:
        """Find the documents of a micro-batch of tokens [M, T+1]."""
        inputs_MT = tokens_MU[:, :-1]
        ends_MT = inputs_MT == self.eod
        mask = positions = None
        if self.reset_attention_mask:
            # Numbers of the documents: an end counts from the next position on.
            number_MT = ends_MT.cumsum(1) - ends_MT.long()
            same_MTT = number_MT[:, :, None] == number_MT[:, None, :]
            mask = same_MTT.tril()[:, None]
        if self.reset_position_ids:
            steps_T = torch.arange(inputs_MT.shape[1], device=tokens_MU.device)
            after_MT = torch.where(ends_MT, steps_T + 1, 0).roll(1, dims=1)
            after_MT[:, 0] = 0
            positions = (steps_T - after_MT.cummax(1).values).t()
        return MaskAndPositions(mask, positions)


def document_rules(options: DataOptions, eod: int) -> DocumentRules | None:
    """The rules that the flags ask for; None if sequences are taken as they are."""
    if not options.reset_attention_mask and not options.reset_position_ids:
        return None
    return DocumentRules(eod, options.reset_attention_mask, options.reset_position_ids)


class MaskAndPositions(NamedTuple):
    """What attention and positions of some rows go by."""

    mask_M1TT: torch.Tensor | None = None
    """bool: query [.., t, :] may attend to key [.., :, t']; None: all positions up to its own."""
    positions_TM: torch.Tensor | None = None
    """int64: position within the document; None: within the sequence."""

    def rows(self, kept_K: torch.Tensor) -> MaskAndPositions:
        """Those of some of the rows."""
        mask, positions = self
        return MaskAndPositions(
            None if mask is None else mask.index_select(0, kept_K),
            None if positions is None else positions.index_select(1, kept_K),
        )


CAUSAL = MaskAndPositions()
"""Sequences as they are: attention to all positions before, whatever document they are of."""
