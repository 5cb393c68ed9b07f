"""Signals as exceptions."""

import os
import signal
from collections.abc import Iterator

import pytest

from megatron_eslm.files import stopped
from megatron_eslm.files.stopped import Stopped, signals_wait, stopped_by_signals


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_the_first_raises_and_what_follows_does_not_interrupt(monkeypatch, number, code) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(Stopped, match=f"stopped by {number.name}") as caught, stopped_by_signals():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)  # passed on by a launcher
            assert not ended
            monkeypatch.setattr(stopped, "REPEAT_SECONDS", -1.0)
            signal.raise_signal(number)  # somebody who will not wait
            assert ended == [code]
    assert caught.value.exit_code == code


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_signals():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_at_a_fork_is_not_lost() -> None:
    """Python ignores what is raised where libraries look after their locks at a fork."""
    strikes = [signal.SIGTERM]
    os.register_at_fork(after_in_parent=lambda: strikes and signal.raise_signal(strikes.pop()))
    with pytest.raises(Stopped), stopped_by_signals(), signals_wait():
        if not (pid := os.fork()):
            os._exit(0)
        os.waitpid(pid, 0)
    assert not strikes
