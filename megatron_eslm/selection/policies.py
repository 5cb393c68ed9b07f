"""The policies: everything, the riskiest, or a random share."""

from __future__ import annotations

import math

import torch

import megatron_eslm.selection.greats
import megatron_eslm.selection.rho1
import megatron_eslm.selection.uncertainty  # noqa: F401  (each registers itself)
from megatron_eslm.ops.head_statistics import HeadStatistics
from megatron_eslm.ops.keep_rule import EXCLUDED
from megatron_eslm.parallel.seeding import generator
from megatron_eslm.selection.batch import Batch
from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.policy import Held, SelectionPolicy, Source, register
from megatron_eslm.selection.state import Peers, SelectionState


@register("clm")
class CausalLM(SelectionPolicy):
    """Plain causal language modelling: every sequence, every token."""

    def instance_scores(self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor) -> torch.Tensor:
        raise AssertionError("clm scores nothing")

    def token_scores(
        self, token_risk_MT: torch.Tensor, batch: Batch, held: Held | None = None
    ) -> torch.Tensor:
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

    def instance_scores(self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor) -> torch.Tensor:
        # Mean over valid positions (line 4); a row without any has no score at all.
        num_valid_M = valid_MT.sum(dim=1)
        sum_M = torch.where(valid_MT, token_risk_MT, 0.0).sum(dim=1)
        return torch.where(num_valid_M > 0, sum_M / num_valid_M.clamp(min=1), EXCLUDED)

    def token_scores(
        self, token_risk_MT: torch.Tensor, batch: Batch, held: Held | None = None
    ) -> torch.Tensor:
        return token_risk_MT


@register("random")
class RandomControl(_Levels):
    """The same shares as eslm, drawn at random: the control beside every claim.

    The draw depends on seed, step and place in the global micro-batch, so every layout drops the
    same sequences and tokens. Nothing is scored, so sequences are dropped right after the
    embedding.
    """

    source = "policy"

    def _uniform_rows(
        self, level: str, valid_MT: torch.Tensor, held: Held | None = None
    ) -> torch.Tensor:
        rows, positions = valid_MT.shape
        # The same numbers, whether rows count by ranks or all through.
        ranks_rows = (self.peers.size, rows) if held is None else (1, held.plan.num_rows)
        shape = ranks_rows if level == "instance" else (*ranks_rows, positions)
        rng = generator(self.seed, "random", level, self.state.iteration, self.state.micro_step)
        draws = torch.rand(shape, generator=rng)
        mine = draws[self.peers.rank] if held is None else draws[0][held.rows_B]
        return mine.to(valid_MT.device)

    def instance_scores(self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor) -> torch.Tensor:
        scores_M = self._uniform_rows("instance", valid_MT)
        return torch.where(valid_MT.any(dim=1), scores_M, -math.inf)

    def token_scores(
        self, token_risk_MT: torch.Tensor, batch: Batch, held: Held | None = None
    ) -> torch.Tensor:
        return self._uniform_rows("token", batch.valid_MT, held)
