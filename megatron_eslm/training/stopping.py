"""Whether a run stops before its last step, and how all ranks come to stop after the same one."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eslm.training.options import TrainingOptions
from megatron_eslm.training.signals import StopSignal


@dataclass(frozen=True)
class Stop:
    """Why a run stops early."""

    reason: str
    """A signal or a flag, for the log."""
    signal: signal.Signals | None
    """None where it was no signal."""


class StopRequests:
    """What asks this rank to stop. Ranks vote, and the sums of their votes say the same to all.

    Args:
        options: --exit-duration-minutes is used.
        signals: which signal this rank has received.
        began_seconds: when the program began, on the monotonic clock.
    """

    def __init__(self, options: TrainingOptions, signals: StopSignal, began_seconds: float) -> None:
        self._signals = signals
        self._minutes = options.exit_duration_minutes
        self._began_seconds = began_seconds
        # --exit-signal, which comes last, tells most.
        self._numbers = signals.numbers[::-1]

    def votes(self) -> list[float]:
        """1.0 for each reason that this rank has, in an order that is the same on all ranks."""
        seconds = time.monotonic() - self._began_seconds
        late = self._minutes is not None and seconds >= 60.0 * self._minutes
        return [*(float(self._signals.received == n) for n in self._numbers), float(late)]

    def agreed(self, votes: Sequence[float]) -> Stop | None:
        """Why all ranks stop, by their votes added up; None where they go on."""
        for number, count in zip(self._numbers, votes, strict=False):
            if count:
                # Whatever comes to this rank from now on is an echo.
                self._signals.note(number)
                return Stop(number.name, number)
        if votes[-1]:
            return Stop(f"--exit-duration-minutes {self._minutes:g}", None)
        return None
