"""The policies: everything, the riskiest, or a random share."""

from __future__ import annotations

import torch

import megatron_eslm.selection.greats
import megatron_eslm.selection.rho1
import megatron_eslm.selection.uncertainty  # noqa: F401  (each registers itself)
from megatron_eslm.ops.head_statistics import HeadStatistics
from megatron_eslm.ops.keep_rule import EXCLUDED
from megatron_eslm.parallel.seeding import generator
from megatron_eslm.selection.batch import Batch, Rows
from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.policy import SelectionPolicy, Source, register
from megatron_eslm.selection.state import Peers, SelectionState


@register("clm")
class CausalLM(SelectionPolicy):
    """Plain causal language modelling: every sequence, every token."""

    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        raise AssertionError("clm scores nothing")

    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        raise AssertionError("clm scores nothing")


class _Levels(SelectionPolicy):
    """A policy that selects at the levels that `--eslm-level` names."""

    source: Source

    def __init__(
        self, options: SelectionOptions, state: SelectionState, peers: Peers, seed: int
    ) -> None:
        super().__init__(options, state, peers, seed)
        if options.eslm_level != "token":
            self.instance_source = self.source
        if options.eslm_level != "instance":
            self.token_source = self.source


@register("eslm")
class ESLM(_Levels):
    """Risk-averse selection (Algorithm 1): VaR over mean early-exit risk, then over token risk."""

    source = "head"

    @property
    def needs_entropy(self) -> bool:
        return self.options.eslm_score == "entropy"

    def token_risk(self, statistics: HeadStatistics) -> torch.Tensor:
        if self.options.eslm_score == "loss":
            return statistics.loss_N
        assert statistics.entropy_N is not None
        return statistics.entropy_N

    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        # Mean over valid positions (line 4); a row without any has no score at all.
        num_valid_M = valid_MT.sum(dim=1)
        sum_M = torch.where(valid_MT, token_risk_MT, 0.0).sum(dim=1)
        return torch.where(num_valid_M > 0, sum_M / num_valid_M.clamp(min=1), EXCLUDED)

    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        return token_risk_MT


@register("random")
class RandomControl(_Levels):
    """The same shares as eslm, drawn at random: the control beside every claim.

    The draw depends on seed, step and the row's number in the step or global micro-batch, so every
    layout drops the same sequences and tokens. Nothing is scored, so sequences that are dropped
    within a micro-batch are dropped right after the embedding.
    """

    source = "policy"

    def _uniform(self, level: str, rows: Rows, *positions: int) -> torch.Tensor:
        rng = generator(self.seed, "random", level, self.state.iteration, self.state.micro_step)
        return torch.rand((rows.total, *positions), generator=rng)[rows.numbers_M]

    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        scores_M = self._uniform("instance", rows).to(valid_MT.device)
        return torch.where(valid_MT.any(dim=1), scores_M, EXCLUDED)

    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        scores_MT = self._uniform("token", rows, batch.valid_MT.shape[1])
        return scores_MT.to(batch.valid_MT.device)
