"""A signal ends a block of code as an exception does, so that what it built aside is removed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT_SECONDS = 3.0
"""Launchers pass on what the terminal has sent already, so one request can arrive twice at once."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.exit_code = 128 + number
        """As shells have it."""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped` in the block; again, later, they end the process at once.

    Signals that are ignored stay so, as those of a job in the background. For the main thread.
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
        previous.clear()  # what still has to be said and left in order is not interrupted
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM arrive behind the block, in which processes are forked.

    What libraries run at a fork would swallow the exception, and with it the signal.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
