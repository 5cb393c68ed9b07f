"""SIGTERM, SIGINT and --exit-signal, from the first line of the program to its last.

| the program | a signal |
|---|---|
| starts: imports, flags, the ranks meet | ends it with one line (`end_at_once`) |
| builds: data, model, engine | the same, and what is half written is removed first (`unwind`) |
| trains | has it save and stop after the step under way (`StopSignal`) |
| ends | changes nothing any more (`ignore`) |

The exit code is 128 + the number of the first. Launchers pass on what the terminal has already
sent to everybody, and batch systems repeat themselves: of all that comes later only a second Ctrl-C
means something, and only after a pause.
"""

# Imported before anything else: nothing here may take time to import.
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType

from megatron_eslm.watchdog.last_words import say

ALWAYS = (signal.SIGINT, signal.SIGTERM)

EXIT_SIGNALS = ("USR1", "USR2", "HUP", "XCPU")
"""What batch systems announce an end with besides; for --exit-signal."""

ECHO_SECONDS = 3.0
"""Two requests that are closer together are one."""

_Handler = Callable[[int, FrameType | None], None]


class Interrupted(BaseException):
    """A signal ends the program where no step can be finished and saved first."""

    def __init__(self, first: signal.Signals, how: str = "without a checkpoint") -> None:
        super().__init__(f"stopped by {first.name}, {how}.")
        self.code = 128 + first


def end_at_once(numbers: Iterable[signal.Signals] = ALWAYS) -> None:
    """From now on these signals end the process: nothing is there yet that should be cleaned up."""

    def end(number: int, frame: FrameType | None) -> None:
        ignore()
        ended = Interrupted(signal.Signals(number))
        _say(f"error: {ended}\n")
        os._exit(ended.code)

    _install(numbers, end)


def unwind(numbers: Iterable[signal.Signals] = ALWAYS) -> None:
    """From now on these signals raise Interrupted in the main thread."""
    raised: list[tuple[signal.Signals, float]] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if raised and now - raised[-1][1] <= ECHO_SECONDS:
            return
        # Again after a while, since libraries may have swallowed it.
        raised.append((signal.Signals(number), now))
        raise Interrupted(raised[0][0])

    _install(numbers, interrupt)


def ignore() -> None:
    """From now on the signals that were handled change nothing."""
    _install(_handled(), signal.SIG_IGN)


def leave_with(code: int) -> None:
    """From now on the signals that were handled end the process: what there is to say is said."""
    _install(_handled(), lambda number, frame: os._exit(code))


def _handled() -> set[signal.Signals]:
    more = {signal.Signals[f"SIG{name}"] for name in EXIT_SIGNALS}
    return {*ALWAYS, *(number for number in more if callable(signal.getsignal(number)))}


def _install(numbers: Iterable[signal.Signals], handler: _Handler | signal.Handlers) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _say(text: str) -> None:
    """By rank 0."""
    if os.environ.get("RANK", "0") == "0":
        say(text)


class StopSignal:
    """While entered, remembers the first of its signals, for training to stop when it can.

    Afterwards the signals do what they did before or, if one has come, nothing any more.
    """

    def __init__(self, numbers: Iterable[signal.Signals] = ALWAYS) -> None:
        self.numbers = tuple(numbers)
        self._first: dict[str, tuple[int]] = {}
        self._ctrl_c_seconds: float | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def received(self) -> signal.Signals | None:
        """The first request."""
        return signal.Signals(self._first["request"][0]) if self._first else None

    def note(self, number: int) -> bool:
        """Take a request; whether it is the first."""
        # One step, since a signal may come in the middle of the handler of another.
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
            return  # an error on its way up still has to be told, and not interrupted
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
        """Whether it is pressed anew, and neither an echo nor one of a hail of them."""
        now, before = time.monotonic(), self._ctrl_c_seconds
        self._ctrl_c_seconds = now
        return before is not None and now - before > ECHO_SECONDS
