"""What is selected, how, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, Among, Range, check_fields
from megatron_eslm.selection.registry import POLICIES

_ALPHA = Range(
    at_least=0, below=1, why="it is the share that is dropped; the paper uses 0.05 to 0.2"
)
_VALID_SHARE = Range(
    above=0,
    at_most=1,
    why="it is the number of validation sequences over that of the micro-batch; the papers use 0.5",
)
_QUANTILE = Range(above=0, at_most=1, why="it is the share of tokens to learn; the paper uses 0.25")
_INSIDE = Range(above=0, below=1)


Scope = Literal["step", "global", "local"]
"""Of --eslm-scope."""


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
    """Confidence level: the share of sequences, and of the kept sequences' tokens, to drop. 0 is
    causal language modelling exactly."""

    eslm_proxy_layers: Annotated[int, ONE_OR_MORE] = 1
    """Blocks of the early exit that scores sequences."""

    eslm_score: Literal["loss", "entropy"] = "loss"
    """Risk of a token: its loss (CVaR-loss) or the entropy of its prediction (VaR-entropy)."""

    eslm_level: Literal["both", "instance", "token"] = "both"
    """Select sequences and tokens, or only one of the two (Appendix E.3)."""

    eslm_scope: Scope | None = None
    """What thresholds are taken over. Of sequences: all that an optimizer step reads, scored ahead
    of it (step; it then trains on whole micro-batches of the riskiest), or each micro-batch of all
    data-parallel ranks (global) or of one rank (local), in one pass. Of tokens: each micro-batch of
    all ranks, or with local of one. By default step where the batch has so many micro-steps that
    it drops one, else global. A pipeline knows step only."""

    eslm_proxy_stride: Annotated[int, ONE_OR_MORE] = 1
    """Score every s-th position of a sequence only: an estimate, cheaper where the head is what
    the proxy costs."""

    eslm_start_iter: Annotated[int, NOT_NEGATIVE] = 0
    """Steps of plain training before selection begins (alpha 0)."""

    eslm_alpha_warmup_iters: Annotated[int, NOT_NEGATIVE] = 0
    """Steps over which alpha then rises from 0 to its level."""

    eslm_adaptive: bool = False
    """ADA-ESLM (Algorithm 2): move alpha from --eslm-alpha so that CVaR stays stable."""

    eslm_gamma: Annotated[float, POSITIVE] = 0.5
    """Sensitivity of ADA-ESLM: alpha is multiplied by exp(-gamma x relative change of CVaR)."""

    eslm_adapt_interval: Annotated[int, ONE_OR_MORE] = 100
    """Steps between ADA-ESLM's updates; CVaR is the mean over their micro-steps."""

    eslm_adapt_epsilon: Annotated[float, POSITIVE] = 1e-8
    """Added to the CVaR that a change is relative to."""

    eslm_alpha_min: Annotated[float, _INSIDE] = 0.01
    """Lowest alpha that ADA-ESLM goes to."""

    eslm_alpha_max: Annotated[float, _INSIDE] = 0.5
    """Highest alpha that ADA-ESLM goes to."""

    greats_valid_share: Annotated[float, _VALID_SHARE] = 0.5
    """Validation sequences of a greats choice, as a share of the micro-batch of a rank."""

    uncertainty_quantile: Annotated[float, _QUANTILE] = 0.25
    """Share of tokens, those of highest loss, that --selection uncertainty learns."""

    max_nonfinite_steps: Annotated[int, ONE_OR_MORE] = 10
    """Stop after so many steps in a row with scores or gradients that are not finite."""

    @property
    def initial_alpha(self) -> float:
        """Share to drop at the first step: 0 for plain training, whatever --eslm-alpha says."""
        if self.selection == "uncertainty":
            return 1.0 - self.uncertainty_quantile
        return 0.0 if self.selection == "clm" else self.eslm_alpha

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_adaptive()

    def _check_adaptive(self) -> None:
        low, high = self.eslm_alpha_min, self.eslm_alpha_max
        if low > high:
            raise ConfigError(
                f"--eslm-alpha-min {low:g} is above --eslm-alpha-max {high:g}; exchange them."
            )
        if not self.eslm_adaptive:
            return
        if self.selection != "eslm" or self.eslm_level == "instance":
            raise ConfigError(
                f"--eslm-adaptive follows the CVaR of token risk, which --selection "
                f"{self.selection} with --eslm-level {self.eslm_level} does not have. Use "
                "--selection eslm with --eslm-level both or token."
            )
        if not low <= self.eslm_alpha <= high:
            raise ConfigError(
                f"--eslm-alpha {self.eslm_alpha:g} is where --eslm-adaptive starts and is outside "
                f"--eslm-alpha-min {low:g} to --eslm-alpha-max {high:g}; change one of them."
            )
