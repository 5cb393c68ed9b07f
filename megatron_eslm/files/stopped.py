"""Turn signals into exceptions, so that cleanup code runs and staging folders are removed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT_SECONDS = 3.0
"""Launchers forward signals that the terminal has already sent, so one request can arrive twice."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.exit_code = 128 + number
        """128 + signal number, as in shells."""
        self.remains = "nothing of it is kept, give the command again"
        """What a command says of its work so far."""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block on SIGINT or SIGTERM; a later repeat ends the process at once.

    Signals that are already ignored stay ignored (a background job's, for example). Main thread
    only.
    """
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            raise Stopped(signal.Signals(number))
        if now - first > REPEAT_SECONDS:
            os._exit(128 + number)

    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    except Stopped:
        previous.clear()  # keep our handlers, so that messages and cleanup are not interrupted
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to the end of the block, which forks processes.

    The fork hooks of libraries would swallow the exception, and the signal with it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
