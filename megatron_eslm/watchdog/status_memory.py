"""Where a process writes what it is doing so that others of its machine can read it afterwards."""

from __future__ import annotations

import mmap
import os
import struct

from megatron_eslm.watchdog.phases import PhaseStamp

_HEAD = struct.Struct("<q?H")
"""Iteration, whether the phase waits, bytes of its name."""
_SIZE = 512
_NAME = "watchdog-status"


class SharedStatus:
    """A piece of memory that outlives its writer while a reader has it open.

    A heartbeat is up to half a second old when its rank dies, and many phases are shorter. The
    memory has no name in any file system, so nothing is left over: readers take it from the
    writer's open files, while the writer lives.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)

    @classmethod
    def create(cls) -> SharedStatus:
        """An empty one, of this process.

        Raises:
            OSError: the system has no such memory.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("no memfd_create")
        fd = os.memfd_create(_NAME)
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    @classmethod
    def of(cls, pid: int, fd: int) -> SharedStatus:
        """That of a living process, which has it open as `fd`.

        Raises:
            OSError: it cannot be opened, or is something else.
        """
        path = f"/proc/{pid}/fd/{fd}"
        if _NAME not in os.readlink(path):
            raise OSError(f"{path} is no shared status")
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def write(self, stamp: PhaseStamp) -> None:
        name = stamp.phase.encode()[: _SIZE - _HEAD.size]
        text = _HEAD.pack(stamp.iteration, stamp.waits, len(name)) + name
        self._memory[: len(text)] = text

    def read(self) -> PhaseStamp | None:
        """What was written last; None if nothing was."""
        iteration, waits, size = _HEAD.unpack_from(self._memory)
        # A writer may have died in the middle of a character.
        name = self._memory[_HEAD.size : _HEAD.size + size].decode(errors="replace")
        return PhaseStamp(iteration, name, waits) if size else None
