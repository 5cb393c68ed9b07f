"""Set alpha per step: start, warm-up and ADA-ESLM (Algorithm 2)."""

from __future__ import annotations

import math

from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import SelectionState


class AlphaController:
    """Update `SelectionState.alpha`; keeps all its own state there too, and so in checkpoints.

    Every rank has a controller and feeds it the same numbers, so alpha is equal on all ranks.
    """

    def __init__(self, options: SelectionOptions, state: SelectionState) -> None:
        self.options = options
        self.state = state
        if state.level is None:
            state.level = state.alpha

    def begin_step(self, iteration: int) -> None:
        """Set alpha for optimizer step `iteration`, from 0.

        0 before --eslm-start-iter, then linearly up to the level over --eslm-alpha-warmup-iters.
        """
        assert self.state.level is not None
        self.state.alpha = self.state.level * self._ramp(iteration)

    def end_step(self, iteration: int, cvar: float | None) -> None:
        """Accumulate a step's CVaR and, at the end of an interval, update the level.

        The first interval only records: Algorithm 2 starts from a CVaR of 0, which would send
        alpha to 0 at the first update. During the warm-up CVaR changes with alpha itself, so
        intervals begin after the warm-up.

        Args:
            iteration: the step that ended, from 0.
            cvar: CVaR of token risk (eq. 2), mean over the step's micro-steps; None if there is
                none.
        """
        o, s = self.options, self.state
        if not o.eslm_adaptive or self._ramp(iteration) < 1.0:
            return
        s.interval_steps += 1
        if cvar is not None and math.isfinite(cvar):  # non-finite steps carry no information
            s.interval_cvar_sum += cvar
            s.interval_finite_steps += 1
        if s.interval_steps < o.eslm_adapt_interval:
            return
        if s.interval_finite_steps:
            self._adapt(s.interval_cvar_sum / s.interval_finite_steps)
        s.interval_cvar_sum, s.interval_finite_steps, s.interval_steps = 0.0, 0, 0

    def _adapt(self, cvar: float) -> None:
        o, s = self.options, self.state
        assert s.level is not None
        if s.cvar_history:
            before = s.cvar_history[-1]
            s.delta = (cvar - before) / (abs(before) + o.eslm_adapt_epsilon)
            # exp() overflows above 700; the limits below apply long before that.
            level = s.level * math.exp(min(700.0, -o.eslm_gamma * s.delta))
            s.level = min(max(level, o.eslm_alpha_min), o.eslm_alpha_max)
        s.cvar_history.append(cvar)

    def _ramp(self, iteration: int) -> float:
        o = self.options
        if iteration < o.eslm_start_iter:
            return 0.0
        if not o.eslm_alpha_warmup_iters:
            return 1.0
        done = iteration - o.eslm_start_iter + 1
        return min(1.0, done / (o.eslm_alpha_warmup_iters + 1))
