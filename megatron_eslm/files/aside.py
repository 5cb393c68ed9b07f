"""A folder to build something in, beside the place where it will appear when it is complete."""

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
"""Ending of a lock beside a folder that only one process builds at a time."""

_LOCK = ".lock"
_OURS = re.compile(r"\..+\.building(-[0-9a-f]{12})?\.lock")


@contextmanager
def aside_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, on the same file system, gone when the block ends.

    Move what was built out of it (or the folder itself) to publish it. Folders that killed
    processes left beside it are removed; those of living ones are not.

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
    """Remove what processes that are gone left of `aside_folder`, for any target beside this one.

    For any: the same target may never be built again.
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
    # The lock comes before the folder, so that no folder is ever seen without its lock.
    while True:
        folder = target.with_name(f".{target.name}.building-{uuid.uuid4().hex[:12]}")
        lock = FileLock(folder.with_name(folder.name + _LOCK))
        if lock.acquire():
            return folder, lock
