"""Durable writes: contents and names are on disk before the call returns."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

# Errors of network and FUSE file systems that cannot sync a folder.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
_warned = False


def sync_file(path: Path) -> None:
    """Force a file's contents to disk; OSError if the disk refuses them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, if its file system supports it.

    Otherwise warns once per process: a power failure may then lose the newest names, which readers
    detect. Other errors raise OSError.
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
                "%s: its file system cannot sync a folder to disk (%s); after a power failure "
                "the newest files there may be missing",
                folder,
                error.strerror,
            )
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file atomically: readers see either the old contents or all of `data`."""
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
