"""A process of the job, and what this machine's kernel says of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["runs", "stopped", "gone"]


class Stat(NamedTuple):
    """Of a process, as /proc has it."""

    state: str
    """A letter."""
    parent: int
    started: int
    """Clock ticks since boot."""


def stat(pid: int) -> Stat | None:
    """What is known of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may itself hold spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return Stat(fields[0], int(fields[1]), int(fields[19]))


@dataclass(frozen=True)
class Process:
    """Identity of a process, across machines and for as long as they are up."""

    host: str
    pid: int
    namespace: str
    """Boot and PID namespace. Processes that share it see each other in /proc; containers of one
    machine may share its host name only."""
    started: int
    """Clock ticks from boot to its start: tells it from a later process with the same number."""

    @classmethod
    def this(cls) -> Process:
        """The calling process; with a namespace of its own where there is no /proc."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        """Process `pid` of this namespace."""
        host = socket.gethostname()
        seen = stat(pid)
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
        except OSError:
            seen = None
        if seen is None:
            return cls(host, pid, str(uuid.uuid4()), 0)
        return cls(host, pid, namespace, seen.started)

    def state(self) -> State:
        """To be asked by a process of the same namespace. A zombie is gone."""
        seen = stat(self.pid)
        if seen is None or seen.state in "ZX" or seen.started != self.started:
            return "gone"
        # Not "t", which is a debugger's doing.
        return "stopped" if seen.state == "T" else "runs"

    def kill(self) -> None:
        """SIGKILL, unless it is gone."""
        if self.state() != "gone":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
