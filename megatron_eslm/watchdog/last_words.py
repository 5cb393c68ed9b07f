"""Write a last message to stderr before the process exits."""

from __future__ import annotations

import os
import select

PATIENCE_SECONDS = 2.0


def say(text: str) -> None:
    """Write to stderr from any thread, without ever blocking for long or raising.

    Bypasses sys.stderr, whose lock another thread may hold. Stderr is often a pipe to the launcher:
    the pipe breaks if the launcher is gone and fills up if the launcher is stopped.
    """
    data = text.encode(errors="replace")
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        while data and poll.poll(1000 * PATIENCE_SECONDS):
            # A writable pipe accepts PIPE_BUF bytes without blocking.
            data = data[os.write(2, data[: select.PIPE_BUF]) :]
    except OSError:
        return
