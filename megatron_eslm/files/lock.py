"""File locks for one writer at a time. The lock names its owner and is freed when it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json

logger = logging.getLogger(__name__)

# Errors of file systems without locks, such as Lustre mounted without `flock`.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_POLL_SECONDS = 0.1
_held: set[FileLock] = set()


class FileLock:
    """Exclusive right to write, held until `release` or until this process ends.

    The kernel holds the lock (flock), so a killed process leaves no lock behind, only a file that
    names its last owner. Forked children do not hold it.
    """

    def __init__(self, path: Path) -> None:
        """Args:
        path: the lock's own file, in an existing folder; removed on release.
        """
        self.path = path
        self.excludes = True
        """False if the file system has no locks, so that others can write at the same time."""
        self._file: int | None = None

    def acquire(self, *, wait_seconds: float = 0.0) -> bool:
        """Take the lock; return False if another process has it.

        Args:
            wait_seconds: how long to wait for the other process.

        Raises:
            OSError: the file cannot be written.
        """
        deadline = time.monotonic() + wait_seconds
        while not self._try():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def take(self, what: str, remedy: str, *, wait_seconds: float = 0.0) -> None:
        """Take the lock, or raise an error that names its owner.

        Args:
            what: the flag and path that the lock protects.
            remedy: a sentence that says what to do instead.
            wait_seconds: how long to wait for the other process.

        Raises:
            ConfigError: another process has the lock.
            OSError: the file cannot be written.
        """
        if self.acquire():
            return
        if wait_seconds:
            logger.info(
                "%s is being written by %s; waiting up to %g seconds for it to end",
                what,
                self.owner(),
                wait_seconds,
            )
        if not self.acquire(wait_seconds=wait_seconds):
            raise ConfigError(f"{what} is being written by {self.owner()}. {remedy}")

    @property
    def held(self) -> bool:
        """Whether this process holds the lock.

        Removing the lock file or its folder loses the lock. Then any process can take it; this one
        must call `release` first.
        """
        return self._file is not None and self._is_current(self._file)

    def owner(self) -> str:
        """Who holds the lock, for messages."""
        try:
            owner = read_json(self.path, max_bytes=4096)
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (FileNotFoundError, ConfigError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Release the lock and remove its file."""
        if self._file is None:
            return
        # A leftover file locks nobody out.
        with contextlib.suppress(OSError):
            if self._is_current(self._file):  # else it may belong to another process
                # Remove it while locked, when nobody else can hold it.
                self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        _held.discard(self)

    def _try(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self.excludes = False
                _warn_once(self.path.parent, error.strerror)
            if not self._is_current(file):
                return False  # the previous owner removed the file after we opened it
            since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
            os.ftruncate(file, 0)
            os.pwrite(file, (json.dumps(owner) + "\n").encode(), 0)
            self._file, file = file, -1
            _held.add(self)
            return True
        finally:
            if file >= 0:
                os.close(file)

    def _is_current(self, file: int) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(file))

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@functools.cache
def _warn_once(folder: Path, reason: str) -> None:
    logger.warning(
        "%s: its file system has no locks (%s); make sure that no other process writes there",
        folder,
        reason,
    )


def _forget() -> None:
    """Drop all locks in a forked child; the parent keeps them."""
    for lock in list(_held):
        if lock._file is not None:
            os.close(lock._file)
            lock._file = None
    _held.clear()


os.register_at_fork(after_in_child=_forget)
