"""Named phases of a rank, for the watchdog and for messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

START = "start"
"""Phase before the first iteration, outside any named phase."""
TRAINING = "training"
"""Phase from the first iteration on, outside any named phase."""


@dataclass(frozen=True)
class PhaseStamp:
    """Iteration and phase of a rank."""

    iteration: int
    """Current optimizer step, from 1 as in the log; 0 before the first."""
    phase: str
    waits: bool
    """Whether the phase waits for other ranks; a rank stuck in such a phase is not at fault."""

    @property
    def starting(self) -> bool:
        """Whether the rank is still building, reading or compiling, which may take long."""
        return self.iteration == 0 and self.phase == START

    def __str__(self) -> str:
        if self.iteration == 0:
            return f'"{self.phase}"' + (
                "" if self.phase == START else " before the first iteration"
            )
        return f'"{self.phase}" of iteration {self.iteration}'


class Phases:
    """Tracks the current phase of this rank; other threads may read it.

        phases.iteration = 12
        with phases("optimizer"):
            ...
        with phases("proxy gather", waits=True):
            ...

    `now` is immutable and replaced at every change. So readers need no lock, and a new object means
    that the rank has made progress.
    """

    def __init__(self) -> None:
        self.now = PhaseStamp(0, START, False)
        self.write: Callable[[PhaseStamp], None] | None = None
        """Called at every change, so twice per phase."""

    def _set(self, stamp: PhaseStamp) -> None:
        self.now = stamp
        if self.write is not None:
            self.write(stamp)

    @property
    def iteration(self) -> int:
        """Current optimizer step, from 1; the training loop sets it outside any phase."""
        return self.now.iteration

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._set(PhaseStamp(value, TRAINING, False))

    @contextlib.contextmanager
    def __call__(self, name: str, *, waits: bool = False) -> Iterator[None]:
        """Enter phase `name`; on exit, return to the enclosing phase.

        Args:
            name: phase name for messages.
            waits: the phase waits for other ranks (a collective, a receive).
        """
        outer = self.now
        self._set(PhaseStamp(outer.iteration, name, waits))
        yield
        # Not in a `finally`: an error is reported with the phase in which it was raised.
        self._set(PhaseStamp(self.now.iteration, outer.phase, outer.waits))
