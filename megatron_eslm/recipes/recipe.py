"""A recipe: one YAML file that names methods, seeds, model and budget of a comparison.

    output: runs/small            # every run gets a folder here
    launch: python                # words before pretrain_gpt.py; deepspeed --num_gpus 8, ...
    seeds: [1, 2]
    prepare:                      # commands that make what the runs read, each once
      - creates: data/text.idx
        run: python tools/preprocess_data.py --input ${corpus} --output-prefix data/text ...
    flags: {num-layers: 4, ...}   # of pretrain_gpt.py, for all runs
    methods:                      # further flags of each
      clm: {selection: clm}
      eslm: {eslm-alpha: 0.1}
      clm at the FLOPs of eslm: {selection: clm, flops-of: eslm}
      rho1: {selection: rho1, needs: clm, reference: "${run:clm}"}
    after:                        # commands for when all runs are done
      - creates: runs/small/tokens.html
        run: python tools/highlight_tokens.py ...

`${name}` stands for `--set name=value`, `${output}` for the output folder, `${run:METHOD}` for the
checkpoints of another method's run with the same seed (in `after`: with the first seed).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_eslm.config.flags import as_words
from megatron_eslm.config.run import GROUPS
from megatron_eslm.errors import ConfigError

_KEYS = ("output", "launch", "seeds", "prepare", "flags", "methods", "after")
_OWN = ("needs", "flops_of")
"""What a method has besides flags."""
_RUNNERS = ("seed", "save", "load", "metrics_file", "dry_run")
"""Flags that are the runner's to set."""
_WITH_LOAD = "load"
"""The one of them that a method may set: weights to start from."""


@dataclass(frozen=True)
class Step:
    """A command that is run once."""

    words: tuple[str, ...]
    creates: Path
    """What is there when it has been done."""


@dataclass(frozen=True)
class RecipeRun:
    """One method with one seed."""

    method: str
    seed: int
    folder: Path
    flags: Mapping[str, Any]
    """All flags but those that the runner sets."""
    needs: str | None
    """The method whose run with this seed has to be finished first."""
    flops_of: str | None
    """The method by whose FLOPs the number of steps is chosen."""

    @property
    def checkpoints(self) -> Path:
        """Where it saves."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Its metrics file."""
        return self.folder / "metrics.jsonl"

    def words(
        self, train_iters: int | None = None, *, resumed: bool = False, planned: bool = False
    ) -> list[str]:
        """The flags of its command.

        Args:
            train_iters: in place of those of the recipe.
            resumed: whether it continues its own checkpoints, whatever it started from.
            planned: whether it is to be described from its start, whatever it has saved by now.
        """
        flags = dict(self.flags)
        start = flags.pop("load", None)
        if train_iters is not None:
            flags["train_iters"] = train_iters
        words = [word for name, value in flags.items() for word in as_words(name, value)]
        load = str(self.checkpoints) if start is None or resumed else str(start)
        own = ["--seed", str(self.seed), "--save", str(self.checkpoints)]
        if not (planned and start is None):
            own += ["--load", load]
        return [*words, *own, "--metrics-file", str(self.metrics)]


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says."""

    path: Path
    output: Path
    launch: tuple[str, ...]
    prepare: tuple[Step, ...]
    runs: tuple[RecipeRun, ...]
    """All methods with the first seed, then with the second, ..."""
    after: tuple[Step, ...]

    def run(self, method: str, seed: int) -> RecipeRun:
        """One of its runs."""
        return next(r for r in self.runs if (r.method, r.seed) == (method, seed))


def read_recipe(path: str | Path, variables: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe and put everything in its place.

    Args:
        path: the YAML file.
        variables: values of `${name}`.

    Raises:
        ConfigError: the file cannot be read or says something that cannot be.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}") from error
    return _Reader(path, dict(variables or {})).recipe(content)


class _Reader:
    """Checks and fills in one file."""

    def __init__(self, path: Path, variables: dict[str, str]) -> None:
        self.path = path
        self.variables = variables
        self.flags = {f.name for cls in GROUPS.values() for f in dataclasses.fields(cls)}

    def recipe(self, content: Any) -> Recipe:
        if not isinstance(content, dict):
            raise self._error("it must be a mapping")
        if unknown := sorted(set(map(str, content)) - set(_KEYS)):
            raise self._error(f"there is no key {unknown[0]!r}{_near(unknown[0], _KEYS)}")
        for key in ("output", "methods"):
            if not content.get(key):
                raise self._error(f"it has no {key!r}")
        output = Path(self._fill(str(content["output"])))
        self.variables["output"] = str(output)
        methods = content["methods"]
        if not isinstance(methods, dict):
            raise self._error("'methods' must map names to flags")
        seeds = content.get("seeds", [1234])
        if not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
            raise self._error(f"'seeds' must be a list of whole numbers, and is {seeds!r}")
        if len(set(seeds)) < len(seeds):
            raise self._error(f"'seeds' {seeds} names one of them twice")
        common = self._named("flags", content.get("flags") or {})
        runs = [
            self._run(str(name), flags, common, seed, output, methods)
            for seed in seeds
            for name, flags in methods.items()
        ]
        self._check_order(runs)
        self._check_folders(runs)
        places = {run.method: run.checkpoints for run in runs if run.seed == seeds[0]}
        return Recipe(
            path=self.path,
            output=output,
            launch=tuple(shlex.split(self._fill(str(content.get("launch", "python"))))),
            prepare=self._steps("prepare", content.get("prepare"), {}),
            runs=tuple(runs),
            after=self._steps("after", content.get("after"), places),
        )

    def _run(
        self,
        name: str,
        flags: Any,
        common: dict[str, Any],
        seed: int,
        output: Path,
        methods: Mapping[Any, Any],
    ) -> RecipeRun:
        if not re.fullmatch(r"[\w.+-]+( [\w.+-]+)*", name):
            raise self._error(f"{name!r} is no name for a method: letters, digits, '.', '+', '-'")
        own = self._named(f"methods: {name}", flags or {}, (*_OWN, _WITH_LOAD))
        needs, flops_of = (own.pop(key, None) for key in _OWN)
        for key, other in (("needs", needs), ("flops-of", flops_of)):
            if other is not None and (other not in methods or other == name):
                raise self._error(f"{key} of {name} is {other!r}, which is no other method")
        folders = {
            str(method): output / _folder(str(method), seed) / "checkpoints" for method in methods
        }
        filled = {key: self._filled(value, folders) for key, value in (common | own).items()}
        return RecipeRun(name, seed, output / _folder(name, seed), filled, needs, flops_of)

    def _named(self, where: str, flags: Any, more: tuple[str, ...] = ()) -> dict[str, Any]:
        """Flags of pretrain_gpt.py by the names of their fields."""
        if not isinstance(flags, dict):
            raise self._error(f"{where} must be a mapping of flags to values")
        named = {str(key).lstrip("-").replace("-", "_"): value for key, value in flags.items()}
        for key in named:
            if key in _RUNNERS and key not in more:
                raise self._error(f"{where} sets --{key.replace('_', '-')}, which the runner sets")
            if key not in self.flags and key not in more:
                raise self._error(
                    f"{where}: pretrain_gpt.py has no option {key}{_near(key, self.flags)}"
                )
        return named

    def _check_order(self, runs: list[RecipeRun]) -> None:
        needs = {run.method: run.needs for run in runs}
        for method in needs:
            seen, now = [method], needs[method]
            while now is not None:
                if now in seen:
                    raise self._error(f"{' needs '.join([*seen, now])}: none of them can be first")
                seen.append(now)
                now = needs[now]

    def _check_folders(self, runs: list[RecipeRun]) -> None:
        taken: dict[Path, str] = {}
        for run in runs:
            other = taken.setdefault(run.folder, run.method)
            if other != run.method:
                raise self._error(f"{other!r} and {run.method!r} would share {run.folder}")

    def _steps(self, key: str, steps: Any, places: Mapping[str, Path]) -> tuple[Step, ...]:
        if steps is not None and not isinstance(steps, list):
            raise self._error(f"{key!r} must be a list")
        made = []
        for step in steps or []:
            if not isinstance(step, dict) or set(step) != {"creates", "run"}:
                raise self._error(f"each step of {key!r} has a 'creates' and a 'run'")
            words = shlex.split(self._fill(str(step["run"]), places))
            made.append(Step(tuple(words), Path(self._fill(str(step["creates"]), places))))
        return tuple(made)

    def _filled(self, value: Any, places: Mapping[str, Path]) -> Any:
        if isinstance(value, list):
            return [self._filled(item, places) for item in value]
        return self._fill(value, places) if isinstance(value, str) else value

    def _fill(self, text: str, places: Mapping[str, Path] | None = None) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name.startswith("run:"):
                if name[4:] not in (places or {}):
                    raise self._error(f"{match[0]} names no method")
                return str((places or {})[name[4:]])
            if name not in self.variables:
                raise self._error(f"{match[0]} has no value; give --set {name}=...")
            return self.variables[name]

        return re.sub(r"\$\{([^}]*)\}", value, text)

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"The recipe {self.path} cannot be used: {what}.")


def _folder(method: str, seed: int) -> str:
    return f"{method.replace(' ', '_')}-seed{seed}"


def _near(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""
