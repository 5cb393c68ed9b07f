"""Set alpha per step: start, warm-up, schedule, ADA-ESLM (Algorithm 2), overtaken references."""

from __future__ import annotations

import logging
import math

from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import SelectionState

logger = logging.getLogger(__name__)

_SMOOTHING = 0.9
"""Weight of earlier steps in the mean excess, which lags some ten steps behind."""


class AlphaController:
    """Update `SelectionState.alpha`; keeps all its own state there too, and so in checkpoints.

    Every rank has a controller and feeds it the same numbers, so alpha is equal on all ranks.
    """

    def __init__(self, options: SelectionOptions, state: SelectionState, train_iters: int) -> None:
        self.options = options
        self.state = state
        last = options.eslm_alpha_end_iter
        self._end_iter = train_iters - 1 if last is None else last
        if state.level is None:
            state.level = state.alpha

    def begin_step(self, iteration: int) -> None:
        """Set alpha for optimizer step `iteration`, from 0.

        0 before --eslm-start-iter, then linearly up to the level over --eslm-alpha-warmup-iters.
        The level is constant, on its way to --eslm-alpha-end, or ADA-ESLM's.
        """
        assert self.state.level is not None
        if self.state.overtaken_at is not None and self.options.eslm_overtaken == "stop":
            self.state.alpha = 0.0
            return
        if (end := self.options.final_alpha) is not None:
            self.state.level = self._scheduled(iteration, end)
        self.state.alpha = self.state.level * self._ramp(iteration)

    def end_step(
        self, iteration: int, cvar: float | None, mean_excess: float | None = None
    ) -> None:
        """Follow a reference that may be overtaken; adapt the level at the end of an interval.

        The first interval only records: Algorithm 2 starts from a CVaR of 0, which would send
        alpha to 0 at the first update. During the warm-up CVaR changes with alpha itself, so
        intervals begin after the warm-up.

        Args:
            iteration: the step that ended, from 0.
            cvar: CVaR of token risk (eq. 2), mean over the step's micro-steps; None if there is
                none.
            mean_excess: the step's mean excess loss (training/mean_excess.py); None if there is
                none.
        """
        self._follow(iteration, mean_excess)
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

    def _follow(self, iteration: int, mean_excess: float | None) -> None:
        """Smooth the mean excess; once it is below 0, the reference is overtaken."""
        s = self.state
        if mean_excess is None or not math.isfinite(mean_excess):
            return
        if s.mean_excess is not None:
            mean_excess = _SMOOTHING * s.mean_excess + (1 - _SMOOTHING) * mean_excess
        s.mean_excess = mean_excess
        if mean_excess >= 0 or s.overtaken_at is not None:
            return
        s.overtaken_at = iteration
        stops = self.options.eslm_overtaken == "stop"
        logger.warning(
            "The model has overtaken its reference at iteration %d: its loss on what it keeps "
            "is %.4f nats lower. --eslm-overtaken %s: %s.",
            iteration + 1,
            -mean_excess,
            self.options.eslm_overtaken,
            "alpha is 0 from here on" if stops else "selection goes on, and may harm from here on",
        )

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

    def _scheduled(self, iteration: int, end: float) -> float:
        """From --eslm-alpha to `end`, linearly."""
        o = self.options
        done = (iteration - o.eslm_start_iter) / max(1, self._end_iter - o.eslm_start_iter)
        share = min(1.0, max(0.0, done))
        return (1.0 - share) * o.initial_alpha + share * end

    def _ramp(self, iteration: int) -> float:
        o = self.options
        if iteration < o.eslm_start_iter:
            return 0.0
        if not o.eslm_alpha_warmup_iters:
            return 1.0
        done = iteration - o.eslm_start_iter + 1
        return min(1.0, done / (o.eslm_alpha_warmup_iters + 1))
