"""Damaged checkpoints, caches and data sets, each given to a run that would read them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.manifest import MANIFEST, checkpoint_name
from megatron_eslm.errors import ConfigError
from tests.chaos import mutations, warm
from tests.chaos.outcome import Outcome, judge
from tests.chaos.table import Table, Verdict
from tests.training.forging import seal
from tests.training.runs import words

ITERS = 6
RESUMED = 4
"""Iteration of the newest checkpoint that a damaged run finds; there is an older one beside it."""


def argv(data: list[str], folder: Path, *more: str | Path) -> list[str]:
    """Flags of a run that saves after every step and loads from where it saves."""
    return words(
        data,
        *("--global-batch-size", 16, "--eslm-alpha", "0.3", "--save-interval", 1),
        *("--save", folder / "save", "--load", folder / "save", "--keep-last", 3),
        *("--metrics-file", folder / "m.jsonl", "--data-cache-path", folder / "cache", *more),
        iters=ITERS,
        micro_batch_size=8,
    )


@dataclass(frozen=True)
class Original:
    """A run that was stopped by a kill after `RESUMED` steps, and what it would have become."""

    folder: Path
    data: list[str]
    whole: Outcome

    @classmethod
    def make(cls, data: list[str], root: Path) -> Original:
        """Run it, once to the end and once to the middle."""
        folder, whole = root / "original", root / "whole"
        for place, more in ((whole, ()), (folder, ("--exit-interval", str(RESUMED)))):
            place.mkdir(parents=True)
            ended = warm.run(argv(data, place, *more), place)
            assert ended.code == 0, ended.err
        own = []
        for prefix in data:
            own.append(str(folder / "data" / Path(prefix).name))
            _copy_data(prefix, own[-1])
        return cls(folder, own, Outcome.of(whole / "m.jsonl", whole / "save"))

    def copy(self, folder: Path) -> list[str]:
        """A copy to be damaged; the prefixes of its data."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return [str(folder / "data" / Path(prefix).name) for prefix in self.data]


def _copy_data(source: str, target: str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    for path in Path(source).parent.glob(f"{Path(source).name}.*"):
        to = Path(target + path.name.removeprefix(Path(source).name))
        (shutil.copytree if path.is_dir() else shutil.copy)(path, to)


def flip_manifest(table: Table, original: Original, folder: Path, every: int = 1) -> None:
    """Flip single bits of the newest manifest: it must be found damaged, the older one used."""
    original.copy(folder)
    save = folder / "save"
    path = save / checkpoint_name(RESUMED) / MANIFEST
    data = path.read_bytes()
    part = "single bits of a manifest"
    for bit in range(0, 8 * len(data), every):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        what = f"bit {bit % 8} of byte {bit // 8}"
        try:
            find_checkpoint(path.parent)
            table.add(part, Verdict.SILENT, f"{what} was not noticed")
        except ConfigError:
            table.add(part, Verdict.REFUSED)
        except Exception as error:
            table.add(part, Verdict.TRACEBACK, f"{what}: {error!r}")
    found = find_checkpoint(save)
    assert found.folder.name == checkpoint_name(RESUMED - 1)


def damage_files(
    table: Table,
    original: Original,
    folder: Path,
    part: str,
    choose: Callable[[Path], list[Path]],
    kinds: tuple[mutations.Mutation, ...],
    times: int,
    rng: random.Random,
) -> None:
    """Damage one file at a time and let the run go on from there.

    Args:
        table: to count in.
        original: what is damaged.
        folder: to work in.
        part: name in the table.
        choose: the files of a copy, any of which may be damaged.
        kinds: ways to damage them.
        times: how many.
        rng: chooses.
    """
    for _ in range(times):
        data = original.copy(folder)
        path = rng.choice(choose(folder))
        what = f"{path.relative_to(folder)}: {rng.choice(kinds)(path, rng)}"
        _continue(table, original, folder, data, part, what)


def _continue(
    table: Table, original: Original, folder: Path, data: list[str], part: str, what: str
) -> None:
    ended = warm.run(argv(data, folder), folder)
    verdict, why = judge(ended, original.whole, folder / "m.jsonl", folder / "save")
    table.add(part, verdict, f"{what}: {why}")


def newest(folder: Path) -> list[Path]:
    """Files of the newest checkpoint."""
    root = folder / "save" / checkpoint_name(RESUMED)
    return sorted(path for path in root.rglob("*") if path.is_file())


def cache(folder: Path) -> list[Path]:
    """Files of the index cache."""
    return sorted(path for path in (folder / "cache").rglob("*") if path.is_file())


def indices(folder: Path) -> list[Path]:
    """The .idx and .meta.json files of the data."""
    files = (folder / "data").iterdir()
    return sorted(path for path in files if path.name.endswith((".idx", ".json")))


def token_files(folder: Path) -> list[Path]:
    """The .bin files of the data."""
    return sorted((folder / "data").glob("*.bin"))


def forge(
    table: Table, original: Original, folder: Path, name: str, times: int, rng: random.Random
) -> None:
    """Give a JSON file of the newest checkpoint odd contents, with sums that fit."""
    path = Path(checkpoint_name(RESUMED)) / name
    value = json.loads((original.folder / "save" / path).read_text())
    for what, odd in mutations.odd_documents(value, times, rng):
        data = original.copy(folder)
        _write_fitting(folder / "save" / path, odd)
        _continue(table, original, folder, data, f"forged {name}", f"{name}: {what}")


def _write_fitting(path: Path, value: Any) -> None:
    """Write a file of a checkpoint and make the sums in its manifest fit."""
    text = json.dumps(value, indent=1)
    if path.name != MANIFEST:
        path.write_text(text)
        seal(path.parent)
    elif isinstance(value, dict):
        value.pop("crc32", None)
        path.write_bytes(manifests._with_sum(text.removesuffix("\n}").encode()))
    else:
        path.write_text(text)
