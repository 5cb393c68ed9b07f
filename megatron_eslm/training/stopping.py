"""Early stops: decide together, so that all ranks stop after the same step."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eslm.config.training_options import TrainingOptions
from megatron_eslm.launch.signals import StopSignal
from megatron_eslm.training.outputs import Outputs


@dataclass(frozen=True)
class Stop:
    """The reason why a run stops early."""

    reason: str
    """A signal or a flag, for the log."""
    signal: signal.Signals | None
    """None if the reason is not a signal."""


class StopRequests:
    """Collects reasons to stop on this rank. Ranks vote; the summed votes decide for all.

    Args:
        options: provides --exit-duration-minutes.
        signals: the signals received by this rank.
        began_seconds: when the program began, on the monotonic clock.
        outputs: knows whether records could not be written.
    """

    def __init__(
        self,
        options: TrainingOptions,
        signals: StopSignal,
        began_seconds: float,
        outputs: Outputs,
    ) -> None:
        self._signals = signals
        self._minutes = options.exit_duration_minutes
        self._began_seconds = began_seconds
        self._outputs = outputs
        # --exit-signal comes last in the list and takes precedence.
        self._numbers = signals.numbers[::-1]

    def votes(self) -> list[float]:
        """1.0 for each reason that this rank has, in the same order on all ranks."""
        seconds = time.monotonic() - self._began_seconds
        late = self._minutes is not None and seconds >= 60.0 * self._minutes
        unwritten = self._outputs.unwritten is not None
        received = (self._signals.received == number for number in self._numbers)
        return [float(reason) for reason in (*received, late, unwritten)]

    def agreed(self, votes: Sequence[float]) -> Stop | None:
        """The reason to stop, from the summed votes of all ranks; None to continue."""
        *received, late, unwritten = votes
        for number, count in zip(self._numbers, received, strict=True):
            if count:
                # Signals that reach this rank from now on are repetitions.
                self._signals.note(number)
                return Stop(number.name, number)
        if late:
            return Stop(f"--exit-duration-minutes {self._minutes:g}", None)
        return Stop("records that could not be written", None) if unwritten else None
