"""Flags of selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, Among, Range, check_fields
from megatron_eslm.selection.registry import POLICIES

_ALPHA = Range(at_least=0, below=1, why="it is the share to drop; the paper uses 0.05 to 0.2")
_VALID_SHARE = Range(
    above=0,
    at_most=1,
    why="it is the ratio of validation sequences to micro-batch sequences; the papers use 0.5",
)
_QUANTILE = Range(above=0, at_most=1, why="it is the share of tokens to learn; the paper uses 0.25")
_INSIDE = Range(above=0, below=1)


Scope = Literal["step", "global", "local"]
"""Values of --eslm-scope."""


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Selection of sequences and tokens."""

    selection: Annotated[str, Among(POLICIES)] = "eslm"
    """Policy: clm trains on everything, eslm on the riskiest (Algorithm 1 of the paper), random on
    the same share drawn at random (the control), rho1 on the tokens of all sequences whose loss is
    furthest above a reference model's, greats on the sequences whose gradients agree most with
    those of validation sequences and least with each other's (each rank among its own, whatever
    --eslm-scope says), uncertainty on the tokens of highest loss while it holds all others to the
    weights that training started from (post-training)."""

    eslm_alpha: Annotated[float, _ALPHA] = 0.1
    """Confidence level: the share of sequences to drop, and the share of the kept sequences'
    tokens to drop. 0 is exactly causal language modelling."""

    eslm_proxy_layers: Annotated[int, ONE_OR_MORE] = 1
    """Transformer blocks before the early exit that scores sequences."""

    eslm_score: Literal["loss", "entropy", "excess"] = "loss"
    """Risk of a token: its loss (CVaR-loss), the entropy of the model's prediction (VaR-entropy),
    or its loss minus that of a reference (excess), which --reference-losses or --reference
    names. Once the model is better than its reference, excess loss says little
    (--eslm-overtaken)."""

    eslm_level: Literal["both", "instance", "token"] = "both"
    """Select sequences (instance), tokens, or both (Appendix E.3)."""

    eslm_scope: Scope | None = None
    """Scope of the thresholds. step: score all sequences of an optimizer step
    first, then train on full micro-batches of the riskiest. global: select within each
    micro-batch of all data-parallel ranks, in one pass. local: the same per rank. Token thresholds
    span each micro-batch of all ranks (of one rank with local). Default: step if dropping
    full micro-steps comes within a third of alpha (8 or more at 0.1), else global. Pipelines
    support step only."""

    eslm_proxy_stride: Annotated[int, ONE_OR_MORE] = 1
    """Score only every s-th position of a sequence: an estimate, cheaper where the head dominates
    the cost of the early exit."""

    eslm_start_iter: Annotated[int, NOT_NEGATIVE] = 0
    """Steps of plain training (alpha 0) before selection begins."""

    eslm_alpha_warmup_iters: Annotated[int, NOT_NEGATIVE] = 0
    """Steps over which alpha rises from 0 to its level after --eslm-start-iter."""

    eslm_alpha_end: Annotated[float, _ALPHA] | None = None
    """A schedule of alpha, rising or falling: linearly from --eslm-alpha at --eslm-start-iter to
    this at --eslm-alpha-end-iter. Default: alpha is constant."""

    eslm_alpha_end_iter: Annotated[int, ONE_OR_MORE] | None = None
    """Step from which alpha is --eslm-alpha-end. Default: the last one."""

    eslm_overtaken: Literal["stop", "keep"] = "stop"
    """What happens with --eslm-score excess once the model is better than its reference, by the
    mean excess loss of the tokens in kept sequences: stop selecting (alpha is 0 from there on), or
    keep on."""

    eslm_adaptive: bool = False
    """ADA-ESLM (Algorithm 2): start from --eslm-alpha and adapt alpha to keep CVaR stable."""

    eslm_gamma: Annotated[float, POSITIVE] = 0.5
    """Sensitivity of ADA-ESLM: each update multiplies alpha by exp(-gamma x relative change of
    CVaR)."""

    eslm_adapt_interval: Annotated[int, ONE_OR_MORE] = 100
    """Steps between ADA-ESLM's updates; CVaR is averaged over all their micro-steps. With
    --model-size the paper's 1000."""

    eslm_adapt_epsilon: Annotated[float, POSITIVE] = 1e-8
    """Added to the denominator of the relative change of CVaR."""

    eslm_alpha_min: Annotated[float, _INSIDE] = 0.01
    """Lower bound of alpha for ADA-ESLM."""

    eslm_alpha_max: Annotated[float, _INSIDE] = 0.5
    """Upper bound of alpha for ADA-ESLM."""

    greats_valid_share: Annotated[float, _VALID_SHARE] = 0.5
    """Validation sequences per selection of --selection greats, as a share of a rank's
    micro-batch."""

    uncertainty_quantile: Annotated[float, _QUANTILE] = 0.25
    """Share of tokens, by highest loss, that --selection uncertainty trains on."""

    max_nonfinite_steps: Annotated[int, ONE_OR_MORE] = 10
    """Stop after this many consecutive steps with non-finite scores or gradients."""

    @property
    def initial_alpha(self) -> float:
        """Share to drop at the first step; 0 for --selection clm, whatever --eslm-alpha says."""
        if self.selection == "uncertainty":
            return 1.0 - self.uncertainty_quantile
        return 0.0 if self.selection == "clm" else self.eslm_alpha

    @property
    def final_alpha(self) -> float | None:
        """Alpha at the end of its schedule; None where it has none."""
        return None if self.selection == "clm" else self.eslm_alpha_end

    @property
    def largest_alpha(self) -> float:
        """Largest share to drop that the run was asked for, ADA-ESLM's own changes aside."""
        return max(self.initial_alpha, self.final_alpha or 0.0)

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_schedule()
        self._check_adaptive()

    def _check_schedule(self) -> None:
        if self.eslm_alpha_end_iter is not None:
            if self.eslm_alpha_end is None:
                raise ConfigError(
                    f"--eslm-alpha-end-iter {self.eslm_alpha_end_iter} has no meaning without "
                    "--eslm-alpha-end, which alpha reaches there. Give both, or neither."
                )
            if self.eslm_alpha_end_iter <= self.eslm_start_iter:
                raise ConfigError(
                    f"--eslm-alpha-end-iter {self.eslm_alpha_end_iter} is not after "
                    f"--eslm-start-iter {self.eslm_start_iter}, where alpha begins. Raise it."
                )
        if self.eslm_alpha_end is not None and self.selection == "uncertainty":
            raise ConfigError(
                f"--eslm-alpha-end {self.eslm_alpha_end:g} has no meaning with --selection "
                "uncertainty, whose share is --uncertainty-quantile. Leave it out."
            )
        if self.eslm_alpha_end is not None and self.eslm_adaptive:
            raise ConfigError(
                f"--eslm-alpha-end {self.eslm_alpha_end:g} and --eslm-adaptive are two rules for "
                "the same alpha; give only one of them."
            )

    def _check_adaptive(self) -> None:
        low, high = self.eslm_alpha_min, self.eslm_alpha_max
        if low > high:
            raise ConfigError(
                f"--eslm-alpha-min {low:g} is above --eslm-alpha-max {high:g}; swap them."
            )
        if not self.eslm_adaptive:
            return
        if self.selection != "eslm" or self.eslm_level == "instance":
            raise ConfigError(
                f"--eslm-adaptive follows the CVaR of token risk, which --selection "
                f"{self.selection} with --eslm-level {self.eslm_level} does not have. Use "
                "--selection eslm with --eslm-level both or token."
            )
        if self.eslm_score == "excess":
            raise ConfigError(
                "--eslm-adaptive follows the relative change of CVaR, and the CVaR of --eslm-score "
                "excess may be zero or negative. Use --eslm-score loss or entropy, or leave out "
                "--eslm-adaptive."
            )
        if not low <= self.eslm_alpha <= high:
            raise ConfigError(
                f"--eslm-adaptive starts from --eslm-alpha {self.eslm_alpha:g}, which is outside "
                f"--eslm-alpha-min {low:g} to --eslm-alpha-max {high:g}; change one of them."
            )
