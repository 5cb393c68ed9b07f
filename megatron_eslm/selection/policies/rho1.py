"""Rho-1: keep the tokens whose loss exceeds that of a reference model by most."""

from __future__ import annotations

import torch

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.policy import SelectionPolicy, Source, register
from megatron_eslm.selection.state import Peers, SelectionState


@register("rho1")
class Rho1(SelectionPolicy):
    """Selective language modelling (Lin et al. 2024, "Rho-1: Not All Tokens Are What You Need").

    A token's score is its excess loss l_theta - l_ref (eq. 3 there); the 1 - alpha of largest
    excess enter the loss (eqs. 4 and 5, with k% = 1 - alpha). All sequences are read in full.
    """

    token_source: Source = "head"
    needs_reference = True

    def __init__(
        self, options: SelectionOptions, state: SelectionState, peers: Peers, seed: int
    ) -> None:
        if options.eslm_level == "instance":
            raise ConfigError(
                "--eslm-level instance leaves nothing to --selection rho1, which selects tokens "
                "only. Leave it out, or use --selection eslm."
            )
        if options.eslm_score != "loss":
            raise ConfigError(
                f"--eslm-score {options.eslm_score} has no meaning with --selection rho1, whose "
                "score is the excess loss. Leave it out, or use --selection eslm."
            )
        super().__init__(options, state, peers, seed)

    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        raise AssertionError("rho1 scores no sequences")

    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        reference_MT = batch.reference_MT
        if reference_MT.shape != token_risk_MT.shape:
            assert self.reference is not None, "neither scored losses nor a reference model"
            reference_MT = self.reference(batch)
        # An infinite loss of the reference must not pass for a token that takes no part.
        return torch.where(reference_MT.isfinite(), token_risk_MT - reference_MT, torch.nan)
