"""Staging folders: build next to the target, then publish by rename."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eslm.files.lock import FileLock

logger = logging.getLogger(__name__)

BUILDER_LOCK = ".building.lock"
"""Suffix of the lock next to a folder that only one process may build at a time."""

_LOCK = ".lock"
_OURS = re.compile(r"\..+\.building(-[0-9a-f]{12})?\.lock")


@contextmanager
def aside_folder(target: Path) -> Iterator[Path]:
    """Yield an empty staging folder next to `target`, on the same file system.

    To publish, move the contents or the folder itself. What remains is removed when the block
    ends. Also removes the staging folders that killed processes left next to `target`, but not
    those of live processes.

    Raises:
        OSError: the folder cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    folder, lock = _own_name(target)
    with lock:
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_stale(target: Path) -> None:
    """Remove the staging folders that dead processes left in the parent folder of `target`.

    This covers all targets in that folder, since the same target may never be built again.
    """
    for path in list(target.parent.iterdir()):
        if not _OURS.fullmatch(path.name):
            continue
        with contextlib.suppress(PermissionError), FileLock(path) as lock:
            if not lock.acquire():
                continue
            # Releasing the lock removes its file.
            folder = path.with_name(path.name.removesuffix(_LOCK))
            if lock.excludes and folder.exists():
                logger.info("removing %s, which a killed process left", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _own_name(target: Path) -> tuple[Path, FileLock]:
    # Lock first, so that no process ever sees the folder without its lock.
    while True:
        folder = target.with_name(f".{target.name}.building-{uuid.uuid4().hex[:12]}")
        lock = FileLock(folder.with_name(folder.name + _LOCK))
        if lock.acquire():
            return folder, lock
