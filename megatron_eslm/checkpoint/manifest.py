"""The manifest of a checkpoint: its files, their sizes and checksums, and its run."""

from __future__ import annotations

import json
import os
import re
import uuid
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol

import pydantic

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import parse_json, read_text
from megatron_eslm.files.regular import open_regular
from megatron_eslm.files.schema import STRICT, Count, parse_as

FORMAT: Final = "megatron_eslm/3"
OLDER = ("megatron_eslm/1", "megatron_eslm/2")
MANIFEST = "manifest.json"
RUN, STATE, TENSORS, TOKENIZER = "run.json", "state.json", "tensors.json", "tokenizer"
_NAME = re.compile(r"iter_(\d{7,})")

RunId = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{32}$")]
"""Created at the start of a run and kept when the run continues."""


def new_run_id() -> str:
    """Create the ID of a new run."""
    return uuid.uuid4().hex


class Stamped(Protocol):
    """Something that names the checkpoint it belongs to.

    Checksums cannot detect a file that was copied from another checkpoint with its manifest entry.
    """

    @property
    def run_id(self) -> str: ...

    @property
    def iteration(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Identity of a checkpoint: run and iteration."""

    __pydantic_config__ = STRICT

    run_id: RunId
    iteration: Count


def _inside(name: str) -> str:
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("must be a plain relative path")
    return name


Name = Annotated[str, pydantic.AfterValidator(_inside)]
"""Path of a file inside the checkpoint's folder."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Size and checksum of one file."""

    __pydantic_config__ = STRICT

    bytes: Count
    crc32: Annotated[int, pydantic.Field(ge=0, lt=2**32)]


@dataclass(frozen=True, kw_only=True)
class Manifest(Stamp):
    """Contents of manifest.json, except its own checksum."""

    __pydantic_config__ = STRICT

    format: Literal["megatron_eslm/3"] = FORMAT
    kind: Literal["training", "weights"]
    files: dict[Name, Entry]
    """All files but the manifest, by path."""

    def __post_init__(self) -> None:
        for name in (RUN, TENSORS):
            if name not in self.files:
                raise ConfigError(f"files do not include {name}")
        if (STATE in self.files) != (self.kind == "training"):
            raise ConfigError(f"kind {self.kind} contradicts the presence or absence of {STATE}")


def damaged(folder: Path, reason: object) -> ConfigError:
    """The error for a damaged checkpoint."""
    return ConfigError(f"{folder} is damaged: {str(reason).rstrip('.')}.")


def checkpoint_name(iteration: int) -> str:
    """Folder name of the checkpoint of an iteration."""
    return f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """Iteration in a checkpoint folder's name; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(save: Path) -> list[Path]:
    """Checkpoint folders under `save`, newest first by name; their contents are not verified."""
    if not save.is_dir():
        return []
    named = {p: iteration for p in save.iterdir() if (iteration := iteration_of(p)) is not None}
    return sorted((p for p in named if p.is_dir()), key=named.__getitem__, reverse=True)


def files_of(folder: Path) -> list[str]:
    """Relative paths of all files but the manifest, sorted."""
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.name != MANIFEST
    )


def describe(path: Path, *, sync: bool = False) -> Entry:
    """Compute size and CRC-32 of a file; with `sync` also force it to disk.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the disk fails.
        ConfigError: it is not a regular file.
    """
    crc = 0
    with open_regular(path) as f:
        while block := f.read(2**22):
            crc = zlib.crc32(block, crc)
        if sync:
            os.fsync(f.fileno())
        return Entry(bytes=f.tell(), crc32=crc)


_SUM = b',\n "crc32": '
"""Separator before the manifest's own checksum, which covers everything before it."""


def encode(manifest: Manifest) -> bytes:
    """Serialize the manifest with its checksum."""
    return _with_sum(json.dumps(asdict(manifest), indent=1).removesuffix("\n}").encode())


def _with_sum(body: bytes) -> bytes:
    return b"%s%s%d\n}\n" % (body, _SUM, zlib.crc32(body))


def decode(data: bytes, folder: Path) -> Manifest:
    """Parse the contents of manifest.json.

    Args:
        data: its bytes; a change to any of them is detected.
        folder: the checkpoint, for messages.

    Raises:
        ConfigError: damaged, or written by another version.
    """
    body, found, _ = data.rpartition(_SUM)
    if not found or _with_sum(body) != data:
        _refuse_older(data, folder)
        raise damaged(folder, f"{MANIFEST} has changed since it was written")
    try:
        values = parse_json(data, MANIFEST)
        form = values.get("format")
        if form == FORMAT:
            del values["crc32"]
            return parse_as(Manifest, values, MANIFEST)
    except ConfigError as error:
        raise damaged(folder, error) from error
    raise ConfigError(f"{folder} has format {form!r}; this version reads {FORMAT!r}.")


def _refuse_older(data: bytes, folder: Path) -> None:
    """Raise a specific error for a manifest of an older format, which had no checksum."""
    try:
        values = parse_json(data, MANIFEST)
    except ConfigError:
        return
    if not isinstance(values, dict) or "crc32" in values or values.get("format") not in OLDER:
        return
    raise ConfigError(
        f"{folder} was saved by an earlier version (format {values['format']!r}; this one reads "
        f"{FORMAT!r}). Finish the run with that version, or convert its weights: export "
        "them there with tools/convert_to_hf.py and import them here with "
        "tools/convert_from_hf.py."
    )


def verify(folder: Path) -> Manifest:
    """Verify all files of a checkpoint against its manifest and return the manifest.

    Unlisted files are ignored: users add notes, network file systems add `.nfs` files, and nothing
    reads them. In `tokenizer/`, however, they count as damage, since libraries read it as a folder.

    Raises:
        ConfigError: foreign, incomplete or damaged; names the file and the reason.
    """
    try:
        data = read_text(folder / MANIFEST).encode()
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not a checkpoint of this system: it has no {MANIFEST}. Convert Hugging "
            "Face folders with tools/convert_from_hf.py."
        ) from None
    except ConfigError as error:
        raise damaged(folder, error) from error
    manifest = decode(data, folder)
    named = iteration_of(folder)
    if named not in (None, manifest.iteration):
        right = checkpoint_name(manifest.iteration)
        raise ConfigError(
            f"{folder} is damaged: it is named for iteration {named} but contains iteration "
            f"{manifest.iteration}. If it was renamed, its name must be {right}."
        )
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected)
    if (folder / TOKENIZER).is_dir():
        for name in files_of(folder / TOKENIZER):
            listed = f"{TOKENIZER}/{name}" in manifest.files
            if not listed and not name.startswith("."):
                raise damaged(folder, f"{TOKENIZER}/{name} is not in {MANIFEST}")
    return manifest


def _check_file(folder: Path, name: str, expected: Entry) -> None:
    try:
        size = (folder / name).stat().st_size
        found = describe(folder / name) if size == expected.bytes else None
    except FileNotFoundError:
        raise damaged(folder, f"{name} is missing") from None
    except OSError as error:
        raise damaged(folder, f"{name} cannot be read: {error.strerror}") from error
    except ConfigError as error:
        raise damaged(folder, error) from error
    if found is None:
        raise damaged(folder, f"{name} has {size} bytes instead of {expected.bytes}")
    if found != expected:
        raise damaged(folder, f"the contents of {name} have changed")


def check_stamp(folder: Path, name: str, found: Stamped, expected: Stamped) -> None:
    """Raise ConfigError unless a file belongs to the checkpoint.

    Args:
        folder: the checkpoint.
        name: the file.
        found: stamp in the file.
        expected: stamp of the checkpoint.
    """
    if found.run_id != expected.run_id:
        raise damaged(folder, f"{name} belongs to another run")
    if found.iteration != expected.iteration:
        raise damaged(
            folder,
            f"{name} belongs to iteration {found.iteration}, not to {expected.iteration}",
        )
