"""Folders that rank 0 builds and the other ranks wait for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_eslm.files.built_once import built_elsewhere, built_once
from megatron_eslm.parallel.ranks import first_on_machine, rank

WAIT_SECONDS = 60.0
"""Longest time until a network file system shows files written on another machine."""


def shared_folder(folder: Path, build: Callable[[Path], object], where: str, key: str = "") -> None:
    """Make sure that every rank finds the output of `build` in `folder`.

    Call it on rank 0 before the others (`rank_zero_first`). Checksums are verified once per
    machine.

    Args:
        folder: the folder to build.
        build: called with an empty folder, which it fills.
        where: a clause that says how to choose another folder, as in "name one with --flag".
        key: as for `built_once`.

    Raises:
        OSError: the folder cannot be written.
        ConfigError: the folder that rank 0 built does not appear on this machine.
    """
    if rank() == 0:
        built_once(folder, build, key=key)
    else:
        built_elsewhere(
            folder,
            f"All machines must share this folder: {where}.",
            key=key,
            contents=first_on_machine(),
            wait_seconds=WAIT_SECONDS,
        )
