"""Shared memory in which a rank records its phase, readable by its neighbours after its death."""

from __future__ import annotations

import mmap
import os
import struct

from megatron_eslm.watchdog.phases import PhaseStamp

_HEAD = struct.Struct("<q?H")
"""Iteration, whether the phase waits, length of its name in bytes."""
_SIZE = 512
_NAME = "watchdog-status"


class SharedStatus:
    """Memory that outlives its writer as long as a reader has it open.

    More exact than heartbeats: the last one is up to half a second old when its rank dies, and many
    phases are shorter. The memory is anonymous (memfd), so no file is left behind; readers open it
    through /proc while the writer lives.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)

    @classmethod
    def create(cls) -> SharedStatus:
        """Create an empty status for this process.

        Raises:
            OSError: the system has no memfd.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("no memfd_create")
        fd = os.memfd_create(_NAME)
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    @classmethod
    def of(cls, pid: int, fd: int) -> SharedStatus:
        """Open the status of a live process, which has it open as `fd`.

        Raises:
            OSError: it cannot be opened or is something else.
        """
        path = f"/proc/{pid}/fd/{fd}"
        if _NAME not in os.readlink(path):
            raise OSError(f"{path} is not a shared status")
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def write(self, stamp: PhaseStamp) -> None:
        name = stamp.phase.encode()[: _SIZE - _HEAD.size]
        text = _HEAD.pack(stamp.iteration, stamp.waits, len(name)) + name
        self._memory[: len(text)] = text

    def read(self) -> PhaseStamp | None:
        """Return the last stamp written; None if there is none."""
        iteration, waits, size = _HEAD.unpack_from(self._memory)
        # The writer may have died in the middle of a character.
        name = self._memory[_HEAD.size : _HEAD.size + size].decode(errors="replace")
        return PhaseStamp(iteration, name, waits) if size else None
