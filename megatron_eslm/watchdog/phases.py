"""What a rank is doing now, by name: for the watchdog and for messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

START = "start"
"""Phase of a rank until its first iteration, outside any phase that has a name."""
TRAINING = "training"
"""The same from the first iteration on."""


@dataclass(frozen=True)
class PhaseStamp:
    """Where a rank is."""

    iteration: int
    """Optimizer step under way, from 1 as in the log; 0 before the first."""
    phase: str
    waits: bool
    """Whether the phase waits for other ranks: then a rank that stays in it is not to blame."""

    @property
    def starting(self) -> bool:
        """Building, reading, compiling: may take long without a sign of life."""
        return self.iteration == 0 and self.phase == START

    def __str__(self) -> str:
        if self.iteration == 0:
            return f'"{self.phase}"' + (
                "" if self.phase == START else " before the first iteration"
            )
        return f'"{self.phase}" of iteration {self.iteration}'


class Phases:
    """Names what this rank does, for whoever looks from another thread.

        phases.iteration = 12
        with phases("optimizer"):
            ...
        with phases("proxy gather", waits=True):
            ...

    `now` is replaced as a whole at every change and never altered: a reader needs no lock, and sees
    that the rank went on by `now` being another object.
    """

    def __init__(self) -> None:
        self.now = PhaseStamp(0, START, False)
        self.write: Callable[[PhaseStamp], None] | None = None
        """Called at every change; costs each phase its time twice."""

    def _set(self, stamp: PhaseStamp) -> None:
        self.now = stamp
        if self.write is not None:
            self.write(stamp)

    @property
    def iteration(self) -> int:
        """Optimizer step under way, from 1; the training loop sets it, outside any phase."""
        return self.now.iteration

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._set(PhaseStamp(value, TRAINING, False))

    @contextlib.contextmanager
    def __call__(self, name: str, *, waits: bool = False) -> Iterator[None]:
        """While entered, this rank is in phase `name`; afterwards in the one around it.

        Args:
            name: what is done, as messages are to name it.
            waits: it waits for other ranks (a collective, a receive).
        """
        outer = self.now
        self._set(PhaseStamp(outer.iteration, name, waits))
        yield
        # Not in a `finally`: an error on its way up is reported with the phase that it comes from.
        self._set(PhaseStamp(self.now.iteration, outer.phase, outer.waits))
