"""Derived files that all ranks of a job read: rank 0 builds them, the others wait for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_eslm.files.built_once import built_elsewhere, built_once
from megatron_eslm.parallel.ranks import first_on_machine, rank

WAIT_SECONDS = 60.0
"""How long a file system may take to show on one machine what was written on another."""


def shared_folder(folder: Path, build: Callable[[Path], object], where: str, key: str = "") -> None:
    """See to it that every rank finds in `folder` what `build` makes.

    Call it on rank 0 before the others (`rank_zero_first`). Checksums are compared once on each
    machine.

    Args:
        folder: the place to build.
        build: fills the empty folder that it is given.
        where: how to name another place, a clause, as in "name a folder by --flag".
        key: as for `built_once`.

    Raises:
        OSError: the folder cannot be written.
        ConfigError: what rank 0 built does not appear on this machine.
    """
    if rank() == 0:
        built_once(folder, build, key=key)
    else:
        built_elsewhere(
            folder,
            f"All machines have to share this folder: {where}.",
            key=key,
            contents=first_on_machine(),
            wait_seconds=WAIT_SECONDS,
        )
