"""SIGTERM, SIGINT and --exit-signal, from the first line of the program to its last.

| phase of the program | effect of a signal |
|---|---|
| starting: imports, flags, rendezvous | exits with one line (`end_at_once`) |
| building: data, model, engine | exits with one line after removing partial output (`unwind`) |
| training | saves and stops after the current step (`StopSignal`) |
| ending | none (`ignore`) |

The exit code is 128 + the number of the first signal. Launchers forward signals that the terminal
has already sent to every process, and batch systems repeat them. So later signals are ignored,
except for a second Ctrl-C after a pause.
"""

# Imported before anything else, so it must import quickly.
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType

from megatron_eslm.watchdog.last_words import say

ALWAYS = (signal.SIGINT, signal.SIGTERM)

EXIT_SIGNALS = ("USR1", "USR2", "HUP", "XCPU")
"""Signals by which batch systems announce the end of a job; choices of --exit-signal."""

ECHO_SECONDS = 3.0
"""Requests closer together than this count as one."""

_Handler = Callable[[int, FrameType | None], None]


class Interrupted(BaseException):
    """A signal ends the program when it cannot finish and save a step first."""

    def __init__(self, first: signal.Signals, how: str = "without a checkpoint") -> None:
        super().__init__(f"stopped by {first.name}, {how}.")
        self.code = 128 + first


def end_at_once(numbers: Iterable[signal.Signals] = ALWAYS) -> None:
    """Make these signals end the process at once; use it while there is nothing to clean up."""

    def end(number: int, frame: FrameType | None) -> None:
        ignore()
        ended = Interrupted(signal.Signals(number))
        _say(f"error: {ended}\n")
        os._exit(ended.code)

    _install(numbers, end)


def unwind(numbers: Iterable[signal.Signals] = ALWAYS) -> None:
    """Make these signals raise Interrupted in the main thread."""
    raised: list[tuple[signal.Signals, float]] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if raised and now - raised[-1][1] <= ECHO_SECONDS:
            return
        # Raise again on a later signal, since a library may have swallowed the first exception.
        raised.append((signal.Signals(number), now))
        raise Interrupted(raised[0][0])

    _install(numbers, interrupt)


def ignore() -> None:
    """Ignore the signals handled so far."""
    _install(_handled(), signal.SIG_IGN)


def leave_with(code: int) -> None:
    """Make the signals handled so far end the process without a message."""
    _install(_handled(), lambda number, frame: os._exit(code))


def _handled() -> set[signal.Signals]:
    more = {signal.Signals[f"SIG{name}"] for name in EXIT_SIGNALS}
    return {*ALWAYS, *(number for number in more if callable(signal.getsignal(number)))}


def _install(numbers: Iterable[signal.Signals], handler: _Handler | signal.Handlers) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _say(text: str) -> None:
    """Write the message on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        say(text)


class StopSignal:
    """Context manager that records the first signal, so that training can stop at a good point.

    On exit, restores the previous handlers or, if a signal has come, ignores further ones.
    """

    def __init__(self, numbers: Iterable[signal.Signals] = ALWAYS) -> None:
        self.numbers = tuple(numbers)
        self._first: dict[str, tuple[int]] = {}
        self._ctrl_c_seconds: float | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def received(self) -> signal.Signals | None:
        """The first signal received; None if there was none."""
        return signal.Signals(self._first["request"][0]) if self._first else None

    def note(self, number: int) -> bool:
        """Record a request; return whether it is the first."""
        # One atomic step, since a signal may interrupt the handler of another.
        mine = (number,)
        return self._first.setdefault("request", mine) is mine

    def __enter__(self) -> StopSignal:
        for number in self.numbers:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return  # keep our handlers, so that nothing interrupts the report of the error
        if self.received is not None:
            ignore()
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self._is_second_ctrl_c()
        if self.note(number):
            _say(
                f"{signal.Signals(number).name}: stopping after this step (Ctrl-C after a pause of "
                f"{ECHO_SECONDS:.0f} s ends at once)\n"
            )
        elif again:
            assert self.received is not None
            raise Interrupted(self.received, "at once by a second Ctrl-C; older checkpoints remain")

    def _is_second_ctrl_c(self) -> bool:
        """Whether it was pressed again after a pause, not forwarded or part of a burst."""
        now, before = time.monotonic(), self._ctrl_c_seconds
        self._ctrl_c_seconds = now
        return before is not None and now - before > ECHO_SECONDS
