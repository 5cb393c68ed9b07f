"""Folders that are built once and then shared by any number of jobs.

A folder is published by one rename, complete and synced to disk, with a record of the size and
checksum of each file. Readers verify the folder against the record, so that a folder damaged by a
power failure or a bad copy is rebuilt instead of used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.aside import BUILDER_LOCK, aside_folder
from megatron_eslm.files.checksum import crc32_of
from megatron_eslm.files.durable import sync_folder
from megatron_eslm.files.lock import FileLock
from megatron_eslm.files.regular import open_regular
from megatron_eslm.files.schema import STRICT, Count, read_as

logger = logging.getLogger(__name__)

RECORD = "built.json"
"""File name of the record."""

_TAKEN = {errno.ENOTEMPTY, errno.EEXIST}
_SILENT_SECONDS = 0.5
_PUBLISH_SECONDS = 30.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class _File:
    """Size and checksum of a file when it was written."""

    __pydantic_config__ = STRICT
    bytes: Count
    crc32: Count


@dataclass(frozen=True, kw_only=True)
class _Record:
    """Contents of a folder when it was published."""

    __pydantic_config__ = STRICT
    key: str
    files: dict[str, _File]
    format_version: Literal[1] = 1


def built_once(
    folder: Path,
    build: Callable[[Path], object],
    *,
    key: str = "",
    patience_seconds: float = 600.0,
) -> None:
    """Make sure that `folder` holds the complete output of `build`.

    Any number of processes may call this at once: one builds, the others wait and use its folder.
    A folder that does not match its record is moved to `NAME.replaced`, so that processes that
    have it open can keep reading, and is rebuilt. Files added to the folder later are not checked.

    Args:
        folder: the folder to build.
        build: called with an empty folder, which it fills.
        key: everything that the contents depend on beyond the folder's name; a folder with
            another key is replaced.
        patience_seconds: how long to wait while another process builds. Then this process builds
            too, and the first to finish publishes.

    Raises:
        OSError: the folder cannot be written.
    """
    if _problem(folder, key) is None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}{BUILDER_LOCK}")) as lock:
        _take_turn(lock, folder, patience_seconds)
        problem = _problem(folder, key)  # another process may have built it meanwhile
        if problem is None:
            return
        if (folder / RECORD).exists():
            logger.warning("%s: building it again", problem)
        else:
            logger.info("building %s", folder)
        with aside_folder(folder) as aside:
            build(aside)
            _seal(aside, key)
            _publish(aside, folder, key)


def built_elsewhere(
    folder: Path, remedy: str, *, key: str = "", contents: bool = True, wait_seconds: float = 60.0
) -> None:
    """Wait until the folder that another process has built is complete on this machine too.

    Network file systems show new names late. A folder still missing after `wait_seconds` is not on
    a shared file system.

    Args:
        folder: the `folder` that the other process passed to `built_once`.
        remedy: a sentence that says what to do if it does not appear.
        key: as for `built_once`.
        contents: also compare checksums, not only names and sizes.
        wait_seconds: how long it may take to appear.

    Raises:
        ConfigError: the folder is missing or incomplete.
    """
    deadline = time.monotonic() + wait_seconds
    while (problem := _problem(folder, key, contents=contents)) is not None:
        if time.monotonic() >= deadline:
            raise ConfigError(f"{problem}, though another process has built it. {remedy}")
        _look_again(folder)


def _look_again(folder: Path) -> None:
    """Wait a moment, then list the parent folder so that an NFS client refreshes its names."""
    time.sleep(_POLL_SECONDS)
    with contextlib.suppress(OSError):
        os.listdir(folder.parent)


def _take_turn(lock: FileLock, folder: Path, patience_seconds: float) -> None:
    """Wait until no other process builds the folder, or until `patience_seconds` have passed."""
    # Another user's lock cannot be opened; two builds at once do no harm.
    with contextlib.suppress(PermissionError):
        if lock.acquire(wait_seconds=_SILENT_SECONDS):
            return
        logger.info("waiting for %s, which builds %s", lock.owner(), folder)
        if not lock.acquire(wait_seconds=patience_seconds):
            logger.warning("still not built after %g s: building it here", patience_seconds)


def _problem(folder: Path, key: str, *, contents: bool = True) -> str | None:
    """Say in a clause why a folder cannot be used; None if it can."""
    try:
        record = read_as(_Record, folder / RECORD)
    except FileNotFoundError:
        return f"{folder} is not there" if not folder.exists() else f"{folder} is not complete"
    except ConfigError as error:
        return str(error).removesuffix(".")
    if record.key != key:
        return f"{folder} was built from something else ({record.key}, not {key})"
    for name, expected in record.files.items():
        path = folder / name
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected.bytes:
                    return f"{path} is damaged: it has {size} bytes instead of {expected.bytes}"
                if contents and crc32_of(file) != expected.crc32:
                    return f"{path} is damaged: its contents have changed"
        except FileNotFoundError:
            return f"{path} is missing"
        except (OSError, ConfigError) as error:
            return f"{path} cannot be read: {error}".removesuffix(".")
    return None


def _seal(folder: Path, key: str) -> None:
    """Write the record of all files and force everything to disk."""
    files: dict[str, _File] = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
            continue
        with path.open("rb") as file:
            name = path.relative_to(folder).as_posix()
            files[name] = _File(crc32=crc32_of(file), bytes=file.tell())
            os.fsync(file.fileno())
    with (folder / RECORD).open("w") as text:
        json.dump(dataclasses.asdict(_Record(key=key, files=files)), text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    for inner in folders:
        sync_folder(inner)


def _publish(aside: Path, folder: Path, key: str) -> None:
    """Rename the finished folder to `folder`, unless another process was faster.

    Another process can be faster on a file system without locks, or if it ran out of patience.
    """
    deadline = time.monotonic() + _PUBLISH_SECONDS
    while True:
        there = folder.exists()
        if there and _problem(folder, key) is None:
            return
        try:
            if there:
                before = folder.with_name(f"{folder.name}.replaced")
                shutil.rmtree(before, ignore_errors=True)
                folder.rename(before)
            aside.rename(folder)
        except OSError as error:
            # Another process was faster; its folder may not be visible here yet.
            faster = error.errno in _TAKEN or (error.errno == errno.ENOENT and aside.exists())
            if not faster or time.monotonic() >= deadline:
                raise
            _look_again(folder)
        else:
            sync_folder(folder.parent)
            return
