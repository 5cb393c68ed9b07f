"""What a selection policy is, and the list of them.

A policy says how sequences and tokens are scored; the keep rule decides, the layers act. Adding one
means writing a class here beside and registering it (CONTRIBUTING.md has a worked example).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

import torch

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.ops.head.statistics import HeadStatistics
from megatron_eslm.ops.keep_rule import Kept, keep_riskiest, num_to_keep
from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.state import Peers, SelectionState

Source = Literal["nothing", "policy", "head"]
"""Where scores come from: no selection at this level, the policy alone (no logits needed), or loss
and entropy of the head."""


class SelectionPolicy(ABC):
    """Scores of sequences (instances) and tokens. Higher means riskier and kept first.

    Shape legend: M rows of this rank, T positions.
    """

    name: ClassVar[str]
    instance_source: Source = "nothing"
    token_source: Source = "nothing"
    chooses_together: ClassVar[bool] = True
    """Whether global thresholds are over all ranks; else each rank chooses alone."""
    learns_from_dropped_tokens: ClassVar[bool] = False
    """Whether its objective has a part for tokens that are not kept."""
    needs_reference: ClassVar[bool] = False
    """Whether token scores need the losses of a reference model."""
    reference: Callable[[Batch], torch.Tensor] | None = None
    """Batch -> float32 [M, T], what the reference model's losses are where the batch brings none;
    set where the model is built, for policies that need it."""

    def __init__(
        self, options: SelectionOptions, state: SelectionState, peers: Peers, seed: int
    ) -> None:
        self.options = options
        self.state = state
        self.peers = peers
        self.seed = seed

    @property
    def selector_depth(self) -> int:
        """After how many blocks sequences are selected; 0 is right after the embedding."""
        return self.options.eslm_proxy_layers if self.instance_source == "head" else 0

    @property
    def needs_entropy(self) -> bool:
        """Whether head statistics must contain the entropy."""
        return False

    @property
    def proxy_stride(self) -> int:
        """Every how many positions the early exit scores."""
        return self.options.eslm_proxy_stride

    @property
    def selects_per_step(self) -> bool:
        """Whether sequences are selected once an optimizer step, ahead of it."""
        return (
            self.options.eslm_scope == "step"
            and self.instance_source != "nothing"
            and self.chooses_together
        )

    @property
    def decides_alone(self) -> bool:
        """Whether each data-parallel rank takes its own thresholds."""
        return self.options.eslm_scope == "local" or not self.chooses_together

    def drops_rows(self, num_rows: int) -> bool:
        """Whether a micro-batch of `num_rows` on each rank loses any at the current alpha."""
        total = num_rows * (1 if self.decides_alone else self.peers.size)
        selects = self.instance_source != "nothing" and not self.selects_per_step
        return selects and num_to_keep(total, self.state.alpha) < total

    @property
    def drops_tokens(self) -> bool:
        """Whether tokens are thresholded at the current alpha."""
        return self.token_source != "nothing" and self.state.alpha > 0

    def rows(self, num_rows: int) -> Rows:
        """The rows of a micro-batch of this rank, among those of all ranks."""
        first = self.peers.rank * num_rows
        return Rows(torch.arange(first, first + num_rows), num_rows * self.peers.size)

    @abstractmethod
    def instance_scores(
        self, token_risk_MT: torch.Tensor, valid_MT: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        """float32 [M]; EXCLUDED for rows without any valid token.

        Args:
            token_risk_MT: that of the early exit; empty if the source is the policy.
            valid_MT: which tokens count.
            rows: which these are of all that are scored together.
        """

    @abstractmethod
    def token_scores(self, token_risk_MT: torch.Tensor, batch: Batch, rows: Rows) -> torch.Tensor:
        """float32 [M, T] for the kept rows among M; entries that are not valid are ignored.

        Args:
            token_risk_MT: loss or entropy of the head; zeros if the source is the policy.
            batch: the rows.
            rows: which these are of the global micro-batch.
        """

    def token_risk(self, statistics: HeadStatistics) -> torch.Tensor:
        """The statistic that is this policy's risk, float32 [N]."""
        return statistics.loss_N

    def keep(self, scores: torch.Tensor, phase: str) -> Kept:
        """The keep rule at the current alpha and the configured scope; `phase` names the wait."""
        if self.decides_alone:
            return keep_riskiest(scores, self.state.alpha, None)
        with self.peers.phases(phase, waits=True):
            return keep_riskiest(scores, self.state.alpha, self.peers.group)


P = TypeVar("P", bound=type[SelectionPolicy])
POLICIES: dict[str, type[SelectionPolicy]] = {}


def register(name: str) -> Callable[[P], P]:
    """Make a policy class available as `--selection name`."""

    def add(cls: P) -> P:
        assert name not in POLICIES, name
        cls.name = name
        POLICIES[name] = cls
        return cls

    return add


class LeveledPolicy(SelectionPolicy):
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
