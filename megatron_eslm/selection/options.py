"""What is selected, how, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_eslm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Selection of sequences and tokens."""

    selection: Literal["clm", "eslm", "random"] = "eslm"
    """Policy: clm trains on everything, eslm on the riskiest (Algorithm 1 of the paper), random on
    the same share drawn at random (the control)."""

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

    eslm_proxy_stride: int = 1
    """Score every s-th position of a sequence only: an estimate, cheaper where the head is what
    the proxy costs."""

    max_nonfinite_steps: int = 10
    """Stop after so many steps in a row with scores or gradients that are not finite."""

    @property
    def initial_alpha(self) -> float:
        """Share to drop at the first step: 0 for plain training, whatever --eslm-alpha says."""
        return 0.0 if self.selection == "clm" else self.eslm_alpha

    def __post_init__(self) -> None:
        if not 0.0 <= self.eslm_alpha < 1.0:
            raise ConfigError(
                f"--eslm-alpha {self.eslm_alpha:g} is outside [0, 1): it is the share that is "
                "dropped; the paper uses 0.05 to 0.2."
            )
        for flag, value in (
            ("--eslm-proxy-layers", self.eslm_proxy_layers),
            ("--eslm-proxy-stride", self.eslm_proxy_stride),
            ("--max-nonfinite-steps", self.max_nonfinite_steps),
        ):
            if value < 1:
                raise ConfigError(f"{flag} {value} must be 1 or more.")
