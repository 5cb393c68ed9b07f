"""SIGTERM and SIGINT end training after the step under way, with a checkpoint."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType


class StopSignal:
    """While entered, remembers SIGTERM or SIGINT; the same one again, later, acts as usual.

    Launchers pass on a signal that the terminal has already sent to the whole process group, so one
    request can arrive twice at once, or as SIGINT and SIGTERM.
    """

    REPEAT_SECONDS = 3.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first_seconds: dict[int, float] = {}
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._restore()  # an error on its way up still has to be told, and not interrupted

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._first_seconds.setdefault(number, now)
        if now - first > self.REPEAT_SECONDS:
            self._restore()
            signal.raise_signal(number)
        self.received = self.received or signal.Signals(number)
