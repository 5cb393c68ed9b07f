"""A folder to build something in, beside the place where it will appear when it is complete."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eslm.files.lock import FileLock

logger = logging.getLogger(__name__)

_LOCK = ".lock"


@contextmanager
def aside_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, on the same file system, gone when the block ends.

    Move what was built out of it (or the folder itself) to publish it. Folders that killed
    processes left beside the same target are removed; those of living ones are not.

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
    """Remove folders that `aside_folder(target)` made in processes that are gone."""
    prefix = _prefix(target)
    for path in list(target.parent.iterdir()):
        if not (path.name.startswith(prefix) and path.name.endswith(_LOCK)):
            continue
        lock = FileLock(path)
        if not lock.acquire():
            continue
        with lock:
            folder = path.with_name(path.name.removesuffix(_LOCK))
            if lock.excludes and folder.exists():
                logger.info("removing %s, which a killed process left", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _own_name(target: Path) -> tuple[Path, FileLock]:
    # The lock comes before the folder, so that no folder is ever seen without its lock.
    while True:
        folder = target.with_name(_prefix(target) + uuid.uuid4().hex[:12])
        lock = FileLock(folder.with_name(folder.name + _LOCK))
        if lock.acquire():
            return folder, lock


def _prefix(target: Path) -> str:
    return f".{target.name}.building-"
