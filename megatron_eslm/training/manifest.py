"""A checkpoint folder, complete or absent: written aside, listed, published by one rename."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError

FORMAT = "megatron_eslm/2"
OLDER = ("megatron_eslm/1",)
MANIFEST = "manifest.json"
KINDS = ("training", "weights")
_NAME = re.compile(r"iter_(\d{7,})")
_ASIDE = ".saving-"
_REMOVED = ".removing-"


def checkpoint_name(iteration: int) -> str:
    """Folder name of the checkpoint of an iteration."""
    return f"iter_{iteration:07d}"


def aside(folder: Path) -> Path:
    """Where a checkpoint is written before it is published under `folder`."""
    return folder.with_name(_ASIDE + folder.name)


def list_checkpoints(save: Path) -> list[Path]:
    """Published checkpoints under `save`, newest first."""
    if not save.is_dir():
        return []
    return sorted(
        (p for p in save.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)),
        key=lambda p: int(p.name[5:]),
        reverse=True,
    )


def files_of(folder: Path) -> list[str]:
    """Relative paths of all files but the manifest, sorted."""
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.name != MANIFEST
    )


def describe(path: Path, *, sync: bool = False) -> dict[str, int]:
    """Size and CRC-32 of a file; with `sync` it is also forced to disk."""
    crc = 0
    with path.open("rb") as f:
        while block := f.read(2**22):
            crc = zlib.crc32(block, crc)
        if sync:
            os.fsync(f.fileno())
    return {"bytes": path.stat().st_size, "crc32": crc}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(folder: Path, head: dict[str, Any], files: dict[str, dict[str, int]]) -> None:
    """Write the manifest into the aside folder and rename it to `folder`: from here it exists."""
    temporary = aside(folder)
    manifest = {"format": FORMAT, **head, "files": files}
    path = temporary / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    describe(path, sync=True)
    _sync_folder(temporary)
    temporary.rename(folder)
    _sync_folder(folder.parent)
    latest = folder.parent / "latest"
    draft = latest.with_name(".latest")
    draft.write_text(folder.name + "\n")
    draft.replace(latest)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill in the middle leaves nothing that looks like one."""
    # Not aside(folder): there the same step may be waiting to be published in its place.
    temporary = folder.with_name(_REMOVED + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    folder.rename(temporary)
    shutil.rmtree(temporary)


def clean(save: Path) -> None:
    """Remove what a killed save left aside."""
    for prefix in (_ASIDE, _REMOVED):
        for leftover in save.glob(prefix + "*"):
            shutil.rmtree(leftover, ignore_errors=True)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        ConfigError: foreign, incomplete or damaged, with the file and the reason.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not a checkpoint of this system: it has no {MANIFEST}. Hugging Face "
            "folders come in through tools/convert_from_hf.py."
        ) from None
    except (OSError, ValueError) as error:  # not JSON, or not even text
        raise ConfigError(f"{folder / MANIFEST} cannot be read: {error}.") from error
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form in OLDER:
        raise ConfigError(
            f"{folder} was saved by an earlier version (format {form!r}; this one reads "
            f"{FORMAT!r}). Finish the run with that version, or take its weights along: export "
            "them there with tools/convert_to_hf.py and bring them in with "
            "tools/convert_from_hf.py."
        )
    if form != FORMAT:
        raise ConfigError(f"{folder} has format {form!r}; this version reads {FORMAT!r}.")
    if manifest.get("kind") not in KINDS or not isinstance(manifest.get("files"), dict):
        raise ConfigError(f"{folder} is damaged: {MANIFEST} is not as it was written.")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{folder} is damaged: {name} is missing.")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ConfigError(
                f"{folder} is damaged: {name} has {size} bytes instead of {expected['bytes']}."
            )
        if describe(path)["crc32"] != expected["crc32"]:
            raise ConfigError(f"{folder} is damaged: the contents of {name} have changed.")
    return manifest
