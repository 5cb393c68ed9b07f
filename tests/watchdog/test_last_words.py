"""What is said at the end, and that it is the end, whatever became of the log."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megatron_eslm.watchdog import last_words

LONG = "Ω" * 200_000 + "\n"


def in_child(log: int | None) -> int:
    """Exit code of a process that says something long to the file `log`, or has none."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(2)
            if log is not None:
                os.dup2(log, 2)
            last_words.say(LONG)
            code = 7
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_all_of_it_is_said() -> None:
    reader, writer = os.pipe()
    heard: list[bytes] = []

    def listen() -> None:
        with os.fdopen(reader, "rb") as pipe:
            heard.append(pipe.read())

    thread = threading.Thread(target=listen)
    thread.start()
    assert in_child(writer) == 7
    os.close(writer)
    thread.join()
    assert heard == [LONG.encode()]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("how", ["broken", "full", "closed", "no space"])
def test_a_log_that_takes_nothing_holds_nobody_up(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_words, "PATIENCE_SECONDS", 0.1)
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    reader, writer = os.pipe()
    log: int | None = writer
    if how == "no space":
        log = os.open("/dev/full", os.O_WRONLY)
    elif how == "broken":
        os.close(reader)
    elif how == "closed":
        log = None
    assert in_child(log) == 7
