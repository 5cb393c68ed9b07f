"""A process of the job and its state according to the kernel."""

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
    """Fields of /proc/PID/stat."""

    state: str
    """One letter, as in `ps`."""
    parent: int
    started: int
    """Clock ticks since boot."""


def stat(pid: int) -> Stat | None:
    """Read /proc/PID/stat; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name in parentheses may itself contain spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return Stat(fields[0], int(fields[1]), int(fields[19]))


@dataclass(frozen=True)
class Process:
    """Identity of a process, unique across machines until they reboot."""

    host: str
    pid: int
    namespace: str
    """Boot ID and PID namespace. Processes that share both see each other in /proc; containers of
    one machine may share its host name without that."""
    started: int
    """Start time in clock ticks since boot; distinguishes it from a later process with its PID."""

    @classmethod
    def this(cls) -> Process:
        """The calling process; its namespace is unique on systems without /proc."""
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
        """State as seen from the same namespace. A zombie counts as gone."""
        seen = stat(self.pid)
        if seen is None or seen.state in "ZX" or seen.started != self.started:
            return "gone"
        # Not "t": stopped by a debugger.
        return "stopped" if seen.state == "T" else "runs"

    def kill(self) -> None:
        """Send SIGKILL, unless the process is gone."""
        if self.state() != "gone":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
