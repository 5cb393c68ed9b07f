"""Bytes that are on the disk before anyone is told of them."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

# What network and FUSE file systems answer that cannot force a folder to disk.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
_warned = False


def sync_file(path: Path) -> None:
    """Force a file's contents to disk; OSError where the disk does not take them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, where its file system can.

    A file system that cannot is said once a process: a machine that loses power may then forget
    the newest names, which a reader can tell. Other errors are OSError.
    """
    global _warned
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        if not _warned:
            _warned = True
            logger.warning(
                "%s: its file system cannot force a folder to disk (%s); after a power failure "
                "the newest files there may be missing",
                folder,
                error.strerror,
            )
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there completely or, until then, as it was before."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
