"""What a process says before it ends, to whoever still listens."""

from __future__ import annotations

import os
import select

PATIENCE_SECONDS = 2.0


def say(text: str) -> None:
    """Write to the log of the job, and come back: from any thread, and whatever became of the log.

    Not through sys.stderr, whose lock another thread may hold. Launchers often read the output of
    their ranks through pipes: one that is gone breaks the pipe, one that is stopped lets it fill.
    """
    data = text.encode(errors="replace")
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        while data and poll.poll(1000 * PATIENCE_SECONDS):
            # A pipe that can be written to takes so much without waiting.
            data = data[os.write(2, data[: select.PIPE_BUF]) :]
    except OSError:
        return
