"""Find the input files in a folder."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

_ABOUT = {"citation", "copying", "licence", "license", "notice", "readme"}
"""Names of files that describe a corpus and are not part of it."""


def find_files(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Find the files with one of the suffixes in a folder and its subfolders, sorted by path.

    Follows links to files and folders. Leaves out hidden names (`.git`, macOS's `._x`), names such
    as README and LICENSE, and other suffixes, with a warning.

    Args:
        folder: an existing folder.
        endings: suffixes such as `.jsonl.gz`; none may be a suffix of another.

    Raises:
        ConfigError: there is no such file; a folder cannot be read; a link is broken; or the same
            text would be read twice (through a link, or from two files whose names differ only in
            the suffix).
    """
    files: list[Path] = []
    left_out: list[Path] = []
    seen: dict[str, Path] = {}
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        _see(current, os.path.realpath(current), seen)
        for path in _entries(current):
            if path.name.startswith("."):
                left_out.append(path)
            elif _is_folder(path):
                waiting.append(path)
            elif _stem(path, endings).lower() in {"", *_ABOUT}:
                left_out.append(path)
            else:
                files.append(path)
    files.sort()
    for path in files:
        _see(path, os.path.realpath(path), seen)
    _refuse_twins(files, endings)
    if not files:
        raise ConfigError(
            f"The folder {folder} holds no file that can be read ({', '.join(endings)})."
        )
    if left_out:
        names = ", ".join(str(path.relative_to(folder)) for path in sorted(left_out)[:3])
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        logger.warning("%s: files to read: %d; left out: %s%s", folder, len(files), names, more)
    return files


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be read: {error.strerror}.") from error


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        what = "is a broken link" if path.is_symlink() else "cannot be read"
        raise ConfigError(
            f"{path} {what} ({error.strerror}). Fix or remove it, or name the files one by one."
        ) from error


def _see(path: Path, real: str, seen: dict[str, Path]) -> None:
    if real in seen:
        raise ConfigError(
            f"{seen[real]} and {path} are the same through a link, so the text would be read "
            "twice. Remove the link, or name the files one by one."
        )
    seen[real] = path


def _stem(path: Path, endings: Sequence[str]) -> str:
    """The name without its suffix; empty if it has none of the suffixes."""
    for ending in endings:
        if path.name.endswith(ending):
            return path.name.removesuffix(ending)
    return ""


def _refuse_twins(files: Sequence[Path], endings: Sequence[str]) -> None:
    by_stem: dict[Path, Path] = {}
    for path in files:
        stem = path.with_name(_stem(path, endings))
        if stem in by_stem:
            raise ConfigError(
                f"{by_stem[stem]} and {path} differ only in the suffix, so they may hold the same "
                "text twice. Remove one, or name the files one by one."
            )
        by_stem[stem] = path
