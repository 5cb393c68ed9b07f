"""The tokens that a model is least certain of, by their loss."""

from __future__ import annotations

import torch

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.policy import SelectionPolicy, Source, register
from megatron_eslm.selection.state import Peers, SelectionState


@register("uncertainty")
class Uncertainty(SelectionPolicy):
    """Keep the --uncertainty-quantile of tokens of highest loss, of all sequences (2503.16511).

    What the others are for, the objective of the same name says.
    """

    token_source: Source = "head"
    learns_from_dropped_tokens = True

    def __init__(
        self, options: SelectionOptions, state: SelectionState, peers: Peers, seed: int
    ) -> None:
        for flag, value, only in (
            ("--eslm-level", options.eslm_level, "both"),
            ("--eslm-score", options.eslm_score, "loss"),
        ):
            if value != only:
                raise ConfigError(
                    f"{flag} {value} has no meaning with --selection uncertainty, which takes the "
                    "tokens of highest loss from all sequences. Leave it out, or use --selection "
                    "eslm."
                )
        super().__init__(options, state, peers, seed)

    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        raise AssertionError("uncertainty scores no sequences")

    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        return token_risk_MT
