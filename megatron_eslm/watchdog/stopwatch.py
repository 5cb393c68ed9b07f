"""A clock that ignores pauses of its own process."""

from __future__ import annotations

import time


class Stopwatch:
    """Accumulates the seconds between calls of `tick`, at most `longest_seconds` per call.

    So a process that was stopped, or waited for the interpreter or the store, does not mistake its
    own pause for silence of the others.
    """

    def __init__(self, longest_seconds: float) -> None:
        self.seconds = 0.0
        self._longest = longest_seconds
        self._last = time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest)
        self._last = now
