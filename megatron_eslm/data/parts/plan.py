"""`PREFIX.parts/plan.json`: what all processes that preprocess one corpus agree on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eslm.data.bad_lines import OnBadLine
from megatron_eslm.data.tokenizers.base import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.durable import write_whole
from megatron_eslm.files.lock import FileLock
from megatron_eslm.files.schema import STRICT, Count, read_as


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of the corpus."""

    __pydantic_config__ = STRICT
    path: str
    bytes: Count


@dataclass(frozen=True, kw_only=True)
class PartsPlan:
    """The corpus and how it is read."""

    __pydantic_config__ = STRICT
    sources: list[str]
    """Inputs as given."""
    inputs: list[InputFile]
    """Files in the order of their documents in the merged pairs; part n is of `inputs[n]`."""
    tokenizer: dict[str, Any]
    text_key: str
    split_key: str | None
    domain_names: Mapping[str, str]
    all_named: bool
    """Whether other domains are refused."""
    append_eod: bool
    on_bad_line: OnBadLine


def parts_folder(prefix: Path) -> Path:
    """Where the parts of a corpus are until they are merged."""
    return prefix.with_name(f"{prefix.name}.parts")


def agree(folder: Path, plan: PartsPlan, tokenizer: Tokenizer) -> None:
    """Write the plan and the tokenizer, or compare with those that another process wrote.

    Raises:
        ConfigError: the parts there are of another plan; names what differs.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".plan.lock") as lock:
        lock.take(str(folder), "Give the command again.", wait_seconds=60.0)
        try:
            found = read_plan(folder)
        except FileNotFoundError:
            tokenizer.save(folder / "tokenizer")
            text = json.dumps(dataclasses.asdict(plan), indent=1, ensure_ascii=False) + "\n"
            write_whole(folder / "plan.json", text.encode())
            return
    for field in dataclasses.fields(PartsPlan):
        ours, theirs = getattr(plan, field.name), getattr(found, field.name)
        if ours != theirs:
            raise ConfigError(
                f"{folder} holds parts that were begun with other {_NAMES[field.name]} "
                f"({_difference(theirs, ours)}). Give the same flags, or remove that folder to "
                "begin anew."
            )


_NAMES = {
    "sources": "--input",
    "inputs": "input files",
    "tokenizer": "tokenizer files",
    "text_key": "--text-key",
    "split_key": "--split-key",
    "domain_names": "--domain-names",
    "all_named": "--domain-names",
    "append_eod": "--append-eod",
    "on_bad_line": "--on-bad-line",
}


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, list):
        for one, other in zip(theirs, ours, strict=False):
            if one != other:
                return f"{one} there, {other} now"
        return f"{len(theirs)} there, {len(ours)} now"
    return f"{theirs!r} there, {ours!r} now"


def read_plan(folder: Path) -> PartsPlan:
    """Read the plan in a folder of parts.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is damaged.
    """
    try:
        return read_as(PartsPlan, folder / "plan.json")
    except ConfigError as error:
        raise ConfigError(f"{error} Remove {folder} to begin anew.") from error
