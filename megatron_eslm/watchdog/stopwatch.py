"""A clock that does not count the time that its owner missed."""

from __future__ import annotations

import time


class Stopwatch:
    """Counts seconds while it is looked at; a longer pause than `longest_seconds` counts as that.

    So a process that was stopped, or waited for the interpreter or the store, does not take the
    time that it missed for the silence of others.
    """

    def __init__(self, longest_seconds: float) -> None:
        self.seconds = 0.0
        self._longest = longest_seconds
        self._last = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest)
        self._last = now
