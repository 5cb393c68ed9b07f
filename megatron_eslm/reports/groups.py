"""Group runs that differ only in the seed: mean and spread."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.runs import Run

PLACES = ("save", "metrics_file", "dump_selection", "data_cache_path")
"""Settings of where a run wrote; ignored when comparing runs."""


@dataclass(frozen=True)
class Spread:
    """One quantity over the runs of a group."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of one or more values; nan if any of them is nan."""
        assert values
        if any(math.isnan(value) for value in values):
            return cls(math.nan, math.nan, math.nan, len(values))
        return cls(sum(values) / len(values), min(values), max(values), len(values))

    def text(self, form: Callable[[float], str]) -> str:
        """Mean, followed by lowest and highest if these differ as printed."""
        low, high = form(self.low), form(self.high)
        return form(self.mean) if low == high else f"{form(self.mean)} [{low}, {high}]"


@dataclass(frozen=True)
class Group:
    """The runs of one method, one for each seed."""

    label: str
    runs: list[Run]

    @property
    def title(self) -> str:
        """Its label with its number of seeds."""
        seeds = len(self.runs)
        return f"{self.label} ({seeds} seed{'s' if seeds > 1 else ''})"

    @property
    def selection(self) -> str | None:
        """The policy of the runs, if it is the same for all."""
        found = {run.settings.get("selection") for run in self.runs}
        return found.pop() if len(found) == 1 else None

    def setting(self, name: str) -> Any:
        """A setting of the first run."""
        return self.runs[0].settings.get(name)

    def spread(self, read: Callable[[Run], float | None]) -> Spread | None:
        """Spread of a quantity over the runs; None if a run lacks it."""
        values = [read(run) for run in self.runs]
        known = [value for value in values if value is not None]
        return Spread.of(known) if len(known) == len(values) else None


def group_runs(runs: Sequence[Run], labels: Sequence[str] | None = None) -> list[Group]:
    """Group runs; groups are in the order of their first runs.

    Args:
        runs: one or more.
        labels: one per run; runs with the same label form a group. Default: runs form a group if
            their settings are equal except for the seed, which must differ; the group is named
            after the common start of its file names.

    Raises:
        ConfigError: the numbers of labels and runs differ.
    """
    if labels is not None:
        if len(labels) != len(runs):
            raise ConfigError(
                f"--labels names {len(labels)} runs, but there are {len(runs)}; give one for each."
            )
        named: dict[str, list[Run]] = {}
        for run, label in zip(runs, labels, strict=True):
            named.setdefault(label, []).append(run)
        return [Group(label, members) for label, members in named.items()]
    names = dict(zip(map(id, runs), default_labels([run.path for run in runs]), strict=True))
    parts = _by_settings(runs)
    labels = [_common_name([names[id(run)] for run in part], part) for part in parts]
    if len(set(labels)) < len(labels):
        labels = [" + ".join(names[id(run)] for run in part) for part in parts]
    return [Group(label, part) for label, part in zip(labels, parts, strict=True)]


def _by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    parts: dict[Any, list[Run]] = {}
    for number, run in enumerate(runs):
        rest = {k: v for k, v in run.settings.items() if k not in (*PLACES, "seed")}
        # Without a seed, runs cannot be matched.
        key = repr(sorted(rest.items())) if run.settings.get("seed") is not None else number
        parts.setdefault(key, []).append(run)
    found: list[list[Run]] = []
    for part in parts.values():
        repeats = len({run.settings.get("seed") for run in part}) < len(part)
        found += [[run] for run in part] if repeats else [part]
    return sorted(found, key=lambda part: min(_place(runs, run) for run in part))


def _place(runs: Sequence[Run], run: Run) -> int:
    return next(i for i, other in enumerate(runs) if other is run)


def default_labels(files: Sequence[str | Path]) -> list[str]:
    """The shortest suffixes of the paths that distinguish the runs; folders if these do."""
    paths = [Path(file).with_suffix("") for file in files]
    folders = [path.parent for path in paths]
    named = all(folder.name for folder in folders)  # not those of a file in the working directory
    if named and len({path.name for path in paths}) == 1 and len(set(folders)) > 1:
        paths = folders
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path.name} #{number}" for number, path in enumerate(paths, start=1)]


def _common_name(names: Sequence[str], part: Sequence[Run]) -> str:
    """Common start of names, without a trailing "seed": clm_s1, clm_s2 -> clm."""
    if len(names) == 1:
        return names[0]
    common = names[0]
    while not all(name.startswith(common) for name in names):
        common = common[:-1]
    if not common:
        return " + ".join(names)
    common = re.sub(r"[\W_]*(?<![a-z])((s|seed)\d*)?[\W_]*$", "", common)
    # clm/seed1, clm/seed2: use the folder's name.
    return common or part[0].path.parent.name or names[0]


def on_common_seeds(a: Group, b: Group) -> tuple[Group, Group]:
    """Restrict two groups to common seeds; unchanged if they share none.

    A seed determines initial weights and data order, so runs with the same seed differ by method
    alone.
    """

    def seeds(group: Group) -> set[Any]:
        return {run.settings.get("seed") for run in group.runs} - {None}

    common = seeds(a) & seeds(b)
    if not common:
        return a, b

    def part(group: Group) -> Group:
        return Group(group.label, [r for r in group.runs if r.settings.get("seed") in common])

    return part(a), part(b)


def differing_settings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Settings in which groups differ -> value in each group; without seeds and PLACES."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.settings)
    told: dict[str, list[Any]] = {}
    for name in names:
        values = [group.setting(name) for group in groups]
        if name not in (*PLACES, "seed") and len(set(map(repr, values))) > 1:
            told[name] = values
    return told


def mixed_settings(group: Group) -> list[str]:
    """Settings, besides the seed, in which runs of one group differ."""
    singles = [Group("", [run]) for run in group.runs]
    return list(differing_settings(singles))
