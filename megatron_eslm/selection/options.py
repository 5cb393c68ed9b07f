"""What is selected, how, and how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_eslm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Selection of sequences and tokens."""

    selection: Literal["clm", "eslm", "random", "rho1", "greats", "uncertainty"] = "eslm"
    """Policy: clm trains on everything, eslm on the riskiest (Algorithm 1 of the paper), random on
    the same share drawn at random (the control), rho1 on the tokens of all sequences whose loss is
    furthest above a reference model's, greats on the sequences whose gradients agree most with
    those of validation sequences and least with each other's (each rank among its own, whatever
    --eslm-scope says), uncertainty on the tokens of highest loss while it holds all others to the
    weights that training started from (post-training)."""

    eslm_alpha: float = 0.1
    """Confidence level: the share of sequences, and of the kept sequences' tokens, to drop. 0 is
    causal language modelling exactly."""

    eslm_proxy_layers: int = 1
    """Blocks of the early exit that scores sequences."""

    eslm_score: Literal["loss", "entropy"] = "loss"
    """Risk of a token: its loss (CVaR-loss) or the entropy of its prediction (VaR-entropy)."""

    eslm_level: Literal["both", "instance", "token"] = "both"
    """Select sequences and tokens, or only one of the two (Appendix E.3)."""

    eslm_scope: Literal["global", "local"] = "global"
    """Threshold over the micro-batches of all data-parallel ranks, or on each rank alone."""

    eslm_balance: bool = True
    """With global thresholds: deal the kept sequences evenly to data-parallel ranks, so that none
    waits for one that keeps more. Nothing is dealt with --eslm-scope local, nor by policies that
    keep all sequences."""

    eslm_proxy_stride: int = 1
    """Score every s-th position of a sequence only: an estimate, cheaper where the head is what
    the proxy costs."""

    eslm_start_iter: int = 0
    """Steps of plain training before selection begins (alpha 0)."""

    eslm_alpha_warmup_iters: int = 0
    """Steps over which alpha then rises from 0 to its level."""

    eslm_adaptive: bool = False
    """ADA-ESLM (Algorithm 2): move alpha from --eslm-alpha so that CVaR stays stable."""

    eslm_gamma: float = 0.5
    """Sensitivity of ADA-ESLM: alpha is multiplied by exp(-gamma x relative change of CVaR)."""

    eslm_adapt_interval: int = 100
    """Steps between ADA-ESLM's updates; CVaR is the mean over their micro-steps."""

    eslm_adapt_epsilon: float = 1e-8
    """Added to the CVaR that a change is relative to."""

    eslm_alpha_min: float = 0.01
    """Lowest alpha that ADA-ESLM goes to."""

    eslm_alpha_max: float = 0.5
    """Highest alpha that ADA-ESLM goes to."""

    greats_valid_share: float = 0.5
    """Validation sequences of a greats choice, as a share of the micro-batch of a rank."""

    uncertainty_quantile: float = 0.25
    """Share of tokens, those of highest loss, that --selection uncertainty learns."""

    max_nonfinite_steps: int = 10
    """Stop after so many steps in a row with scores or gradients that are not finite."""

    @property
    def initial_alpha(self) -> float:
        """Share to drop at the first step: 0 for plain training, whatever --eslm-alpha says."""
        if self.selection == "uncertainty":
            return 1.0 - self.uncertainty_quantile
        return 0.0 if self.selection == "clm" else self.eslm_alpha

    def __post_init__(self) -> None:
        if not 0.0 <= self.eslm_alpha < 1.0:
            raise ConfigError(
                f"--eslm-alpha {self.eslm_alpha:g} is outside [0, 1): it is the share that is "
                "dropped; the paper uses 0.05 to 0.2."
            )
        if not 0.0 < self.uncertainty_quantile <= 1.0:
            raise ConfigError(
                f"--uncertainty-quantile {self.uncertainty_quantile:g} is outside (0, 1]: it is "
                "the share of tokens to learn; the paper uses 0.25."
            )
        self._check_schedule()
        self._check_greats()
        for flag, value in (
            ("--eslm-adapt-interval", self.eslm_adapt_interval),
            ("--eslm-proxy-layers", self.eslm_proxy_layers),
            ("--eslm-proxy-stride", self.eslm_proxy_stride),
            ("--max-nonfinite-steps", self.max_nonfinite_steps),
        ):
            if value < 1:
                raise ConfigError(f"{flag} {value} must be 1 or more.")

    def _check_greats(self) -> None:
        if not 0.0 < self.greats_valid_share <= 1.0:
            raise ConfigError(
                f"--greats-valid-share {self.greats_valid_share:g} is outside (0, 1]: it is the "
                "number of validation sequences over that of the micro-batch; the papers use 0.5."
            )
        if self.selection == "greats" and self.eslm_level == "token":
            raise ConfigError(
                "--selection greats chooses sequences and trains on all of their tokens, which "
                "--eslm-level token rules out. Leave --eslm-level out."
            )

    def _check_schedule(self) -> None:
        for flag, value in (
            ("--eslm-start-iter", self.eslm_start_iter),
            ("--eslm-alpha-warmup-iters", self.eslm_alpha_warmup_iters),
        ):
            if value < 0:
                raise ConfigError(f"{flag} {value} must be 0 or more.")
        for flag, number in (
            ("--eslm-gamma", self.eslm_gamma),
            ("--eslm-adapt-epsilon", self.eslm_adapt_epsilon),
        ):
            if not 0.0 < number < math.inf:
                raise ConfigError(f"{flag} {number:g} must be above 0.")
        low, high = self.eslm_alpha_min, self.eslm_alpha_max
        if not 0.0 < low <= high < 1.0:
            raise ConfigError(
                f"--eslm-alpha-min {low:g} and --eslm-alpha-max {high:g} must be in (0, 1) and in "
                "order."
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
