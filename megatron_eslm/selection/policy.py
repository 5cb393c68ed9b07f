"""Base class and registry of selection policies.

A policy scores sequences and tokens; the keep rule decides, the layers act. To add a policy, write
one file in `policies/` (docs/extending.md has a worked example).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.head.statistics import HeadStatistics
from megatron_eslm.ops.keep_rule import EXCLUDED, KeepDecision, keep_riskiest, num_to_keep
from megatron_eslm.selection.registry import POLICIES
from megatron_eslm.selection.scored import ScoredBatch
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, SelectionState
from megatron_eslm.selection.traits import PolicyTraits, Source

_LEVELS = {"instance": "sequences", "token": "tokens"}


class SelectionPolicy:
    """Scores sequences and tokens. Higher scores mean riskier and are kept first.

    A subclass declares the source of its scores and overrides the scoring method of each level at
    which it selects. Shape legend: M rows of this rank, P positions.
    """

    name: ClassVar[str]
    sequence_source: ClassVar[Source] = "nothing"
    token_source: ClassVar[Source] = "nothing"
    needs_reference: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    holds_dropped_tokens: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()
    """Fields of SelectionOptions that the policy reads: its own, and eslm_level and eslm_score if
    it supports them. If it does not, values other than the default are refused."""
    reference: Callable[[Batch], torch.Tensor] | None = None
    """Batch -> float32 [M, T], losses of the reference model for batches without stored ones. Set
    when the model is built, for policies that need it."""

    def __init__(
        self, options: SelectionOptions, state: SelectionState, peers: Peers, seed: int
    ) -> None:
        self.options = options
        self.traits = self.traits_of(options)
        self.state = state
        self.peers = peers
        self.seed = seed
        self._last_reference: tuple[Batch, torch.Tensor] | None = None

    @classmethod
    def traits_of(cls, options: SelectionOptions) -> PolicyTraits:
        """Traits of this policy under these options.

        Raises:
            ConfigError: the options leave nothing to select, or ask for a level or score that the
                policy does not support.
        """
        cls._check(options)
        level = options.eslm_level if "eslm_level" in cls.reads else "both"
        sequences: Source = "nothing" if level == "token" else cls.sequence_source
        tokens: Source = "nothing" if level == "instance" else cls.token_source
        early_exit = sequences == "head"
        selects = (sequences, tokens) != ("nothing", "nothing")
        scoped = selects and not cls.needs_gradients
        reads = set(cls.reads)
        if "eslm_overtaken" in reads and options.eslm_score != "excess":
            reads.remove("eslm_overtaken")
        if selects:
            reads |= {"eslm_start_iter", "eslm_alpha_warmup_iters"}
            reads |= {"eslm_alpha_end", "eslm_alpha_end_iter"}
        if scoped:
            reads.add("eslm_scope")
        if early_exit:
            reads |= {"eslm_proxy_layers", "eslm_proxy_stride"}
        if options.eslm_adaptive:
            reads |= {"eslm_gamma", "eslm_adapt_interval", "eslm_adapt_epsilon"}
            reads |= {"eslm_alpha_min", "eslm_alpha_max"}
        return PolicyTraits(
            sequence_source=sequences,
            token_source=tokens,
            scope=options.eslm_scope if scoped else None,
            early_exit_blocks=options.eslm_proxy_layers if early_exit else 0,
            proxy_stride=options.eslm_proxy_stride if early_exit else 1,
            needs_entropy="eslm_score" in cls.reads and options.eslm_score == "entropy",
            needs_reference=cls.needs_reference
            or ("eslm_score" in cls.reads and options.eslm_score == "excess"),
            scores_excess="eslm_score" in cls.reads and options.eslm_score == "excess",
            needs_gradients=cls.needs_gradients,
            holds_dropped_tokens=cls.holds_dropped_tokens,
            reads=frozenset(reads),
        )

    @classmethod
    def _check(cls, options: SelectionOptions) -> None:
        sources = {"instance": cls.sequence_source, "token": cls.token_source}
        if set(sources.values()) == {"nothing"}:
            return
        level, score = options.eslm_level, options.eslm_score
        if level != "both" and sources[level] == "nothing":
            (has,) = (_LEVELS[name] for name, source in sources.items() if source != "nothing")
            raise ConfigError(
                f"--eslm-level {level} leaves --selection {cls.name} nothing to select; it selects "
                f"{has} only. Leave out --eslm-level, or use --selection eslm."
            )
        if score != "loss" and "eslm_score" not in cls.reads and "head" in sources.values():
            raise ConfigError(
                f"--eslm-score {score} has no meaning with --selection {cls.name}, which has its "
                "own score. Leave out --eslm-score, or use --selection eslm."
            )

    def drops_rows(self, num_rows: int) -> bool:
        """Whether a micro-batch of `num_rows` rows per rank loses any at the current alpha."""
        total = num_rows * (1 if self.traits.ranks_decide_alone else self.peers.size)
        return self.traits.selects_in_model and num_to_keep(total, self.state.alpha) < total

    @property
    def drops_tokens(self) -> bool:
        """Whether tokens are thresholded at the current alpha."""
        return self.traits.selects_tokens and self.state.alpha > 0

    def rows(self, num_rows: int) -> Rows:
        """The rows of a micro-batch of this rank, among those of all ranks."""
        return Rows(self.peers.rank * num_rows, num_rows, num_rows * self.peers.size)

    def reference_losses(self, batch: Batch) -> torch.Tensor:
        """float32 [M, T]: the batch's stored losses, or else the reference model's.

        [M, 0] for policies that need no reference.
        """
        if not self.traits.needs_reference or batch.reference_MT.shape == batch.valid_MT.shape:
            return batch.reference_MT
        assert self.reference is not None, "neither stored losses nor a reference model"
        # Where sequences are selected in the model, their tokens need the same losses soon after.
        if self._last_reference is None or self._last_reference[0] is not batch:
            self._last_reference = batch, self.reference(batch)
        return self._last_reference[1]

    def sequence_scores(self, scored: ScoredBatch) -> torch.Tensor:
        """`score_sequences`; EXCLUDED for rows without any valid token, and for no others."""
        return _among(scored.valid_MP.any(1), self.score_sequences(scored))

    def token_scores(self, scored: ScoredBatch, takes_part_MT: torch.Tensor) -> torch.Tensor:
        """`score_tokens`; EXCLUDED for tokens that take no part, and for no others."""
        return _among(takes_part_MT, self.score_tokens(scored))

    def score_sequences(self, scored: ScoredBatch) -> torch.Tensor:
        """float32 [M]; what stands where a row has no valid token is ignored."""
        raise NotImplementedError(f"{self.name} has no scores of sequences")

    def score_tokens(self, scored: ScoredBatch) -> torch.Tensor:
        """float32 [M, P]; values at invalid positions and in dropped rows are ignored."""
        raise NotImplementedError(f"{self.name} has no scores of tokens")

    def token_risk(self, statistics: HeadStatistics) -> torch.Tensor:
        """Risk per token: one of the head's statistics, float32 [N]."""
        return statistics.loss_N

    @property
    def keeps_by_rule(self) -> bool:
        """Whether `keep` is the keep rule, so that the number of scores says how many it keeps."""
        return type(self).keep is SelectionPolicy.keep

    def keep(self, scores: torch.Tensor, phase: str) -> KeepDecision:
        """Apply the keep rule at the current alpha and the configured scope.

        Args:
            scores: float32 [M] or [M, P].
            phase: name under which the watchdog reports waiting for other ranks.
        """
        if self.traits.ranks_decide_alone:
            return keep_riskiest(scores, self.state.alpha, None)
        with self.peers.phases(phase, waits=True):
            return keep_riskiest(scores, self.state.alpha, self.peers.group)


def _among(takes_part: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Scores of those that take part; minus infinity, were it one of them, becomes finite."""
    return torch.where(takes_part, scores.clamp(min=torch.finfo(torch.float32).min), EXCLUDED)


P = TypeVar("P", bound=type[SelectionPolicy])


def register(name: str) -> Callable[[P], P]:
    """Make a policy class available as `--selection name`."""

    def add(cls: P) -> P:
        assert name not in POLICIES, name
        cls.name = name
        POLICIES[name] = cls
        return cls

    return add
