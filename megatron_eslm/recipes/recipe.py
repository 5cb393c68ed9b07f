"""A recipe: one YAML file that names methods, seeds, model and budget of a comparison.

    base: scales/${scale}.yaml    # another recipe to build on (base.py says how they merge)
    defaults: {scale: small}      # values of ${name} that --set may change
    output: runs/${scale}/alpha   # every run gets a folder here
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

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_eslm.config.flags import Option, by_field_name, options
from megatron_eslm.config.run import GROUPS
from megatron_eslm.errors import ConfigError, did_you_mean
from megatron_eslm.files import yaml_file
from megatron_eslm.files.yaml_file import Value
from megatron_eslm.recipes.base import fill, read_with_base

_KEYS = ("output", "launch", "seeds", "prepare", "flags", "methods", "after")
"""Besides `base` and `defaults`."""
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
    flags: Mapping[str, list[str]]
    """The words of all flags but those that the runner sets, by the names of their fields."""
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
        if resumed:
            flags.pop("finetune", None)  # that is how it began
        _, start = flags.pop("load", ["--load", None])
        if train_iters is not None:
            flags["train_iters"] = ["--train-iters", str(train_iters)]
        words = [word for part in flags.values() for word in part]
        load = str(self.checkpoints) if resumed or start is None else start
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
    content, values = read_with_base(path, variables or {})
    return _Reader(path, values).recipe(content)


class _Reader:
    """Checks and fills in one file."""

    def __init__(self, path: Path, variables: dict[str, str]) -> None:
        self.path = path
        self.variables = variables
        self.options = options(GROUPS)

    def recipe(self, content: yaml_file.Mapping) -> Recipe:
        for key in content:
            if key not in _KEYS:
                known = ("base", "defaults", *_KEYS)
                raise self._error(f"there is no key {key!r}.{did_you_mean(key, known)}")
        methods = self._mapping("'methods'", content.get("methods"))
        if not methods:
            raise self._error("it has no 'methods'")
        output = Path(self._text("'output'", content.get("output")))
        self.variables["output"] = str(output)
        seeds = self._seeds(content.get("seeds"))
        common = self._named("flags", content.get("flags"))
        runs = [
            self._run(name, flags, common, seed, output, methods)
            for seed in seeds
            for name, flags in methods.items()
        ]
        self._check_order(runs)
        self._check_folders(runs)
        places = {run.method: run.checkpoints for run in runs if run.seed == seeds[0]}
        return Recipe(
            path=self.path,
            output=output,
            launch=self._command("'launch'", content.get("launch") or "python"),
            prepare=self._steps("prepare", content.get("prepare"), {}),
            runs=tuple(runs),
            after=self._steps("after", content.get("after"), places),
        )

    def _seeds(self, given: Value) -> list[int]:
        texts = ["1234"] if given is None else given
        if not isinstance(texts, list) or not texts:
            raise self._error("'seeds' must be a list of whole numbers, as in [1, 2]")
        seeds = [self.options["seed"].value(text, f"{self._where}: 'seeds'") for text in texts]
        if len(set(seeds)) < len(seeds):
            raise self._error(f"'seeds' {seeds} names one of them twice")
        return seeds

    def _run(
        self,
        name: str,
        flags: Value,
        common: dict[str, Value],
        seed: int,
        output: Path,
        methods: Collection[str],
    ) -> RecipeRun:
        if not re.fullmatch(r"[\w.+-]+( [\w.+-]+)*", name):
            raise self._error(f"{name!r} is no name for a method: letters, digits, '.', '+', '-'")
        where = f"methods: {name}"
        own = self._named(where, flags, (*_OWN, _WITH_LOAD))
        others = {key: own.pop(key, None) for key in _OWN}
        for key, other in others.items():
            if other is not None and (
                not isinstance(other, str) or other not in methods or other == name
            ):
                flag = key.replace("_", "-")
                raise self._error(f"{flag} of {name} is {other!r}, which is no other method")
        folders = {method: output / _folder(method, seed) / "checkpoints" for method in methods}
        words = {
            key: self._words(self.options[key], self._filled(value, folders), where)
            for key, value in (common | own).items()
        }
        return RecipeRun(name, seed, output / _folder(name, seed), words, **others)  # type: ignore[arg-type]

    def _words(self, option: Option, value: Value, where: str) -> list[str]:
        return option.words(value, f"{self._where}: {where}: {option.name}")

    def _named(self, where: str, flags: Value, more: tuple[str, ...] = ()) -> dict[str, Value]:
        """Flags of pretrain_gpt.py by the names of their fields."""
        said = self._mapping(where, flags)
        named = by_field_name(said, self.options, f"{self._where}: {where}", more)
        for key in named:
            if key in _RUNNERS and key not in more:
                raise self._error(f"{where} sets --{key.replace('_', '-')}, which the runner sets")
        return named

    def _check_order(self, runs: list[RecipeRun]) -> None:
        for kind in _OWN:
            before: dict[str, str | None] = {run.method: getattr(run, kind) for run in runs}
            for method in before:
                seen, now = [method], before[method]
                while now is not None:
                    if now in seen:
                        chain = f" {kind.replace('_', '-')} ".join([*seen, now])
                        raise self._error(f"{chain}: none of them can be first")
                    seen.append(now)
                    now = before[now]

    def _check_folders(self, runs: list[RecipeRun]) -> None:
        taken: dict[Path, str] = {}
        for run in runs:
            other = taken.setdefault(run.folder, run.method)
            if other != run.method:
                raise self._error(f"{other!r} and {run.method!r} would share {run.folder}")

    def _steps(self, key: str, steps: Value, places: Mapping[str, Path]) -> tuple[Step, ...]:
        if steps is not None and not isinstance(steps, list):
            raise self._error(f"{key!r} must be a list")
        made = []
        for step in steps or []:
            if not isinstance(step, dict) or set(step) != {"creates", "run"}:
                raise self._error(f"each step of {key!r} has a 'creates' and a 'run'")
            words = self._command(f"'run' of {key!r}", step["run"], places)
            made.append(
                Step(words, Path(self._text(f"'creates' of {key!r}", step["creates"], places)))
            )
        return tuple(made)

    def _command(
        self, what: str, given: Value, places: Mapping[str, Path] | None = None
    ) -> tuple[str, ...]:
        text = self._text(what, given, places)
        try:
            return tuple(shlex.split(text))
        except ValueError as error:
            raise self._error(f"{what} is no command: {error}, in {text!r}") from error

    def _text(self, what: str, given: Value, places: Mapping[str, Path] | None = None) -> str:
        """Text that has to be there, filled in."""
        if not isinstance(given, str) or not given.strip():
            raise self._error(f"{what} must be text" if given else f"it has no {what}")
        return self._fill(given, places)

    def _mapping(self, what: str, given: Value) -> yaml_file.Mapping:
        if given is None:
            return yaml_file.Mapping()
        if not isinstance(given, yaml_file.Mapping):
            raise self._error(f"{what} must be a mapping, as in `key: value`")
        return given

    def _filled(self, value: Value, places: Mapping[str, Path]) -> Value:
        if isinstance(value, list):
            return [self._filled(item, places) for item in value]
        return self._fill(value, places) if isinstance(value, str) else value

    def _fill(self, text: str, places: Mapping[str, Path] | None = None) -> str:
        runs = {f"run:{method}": str(place) for method, place in (places or {}).items()}
        return fill(text, self.variables | runs, self.path)

    @property
    def _where(self) -> str:
        return f"The recipe {self.path}"

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"{self._where} cannot be used: {what}{'' if what[-1] in '.?' else '.'}")


def _folder(method: str, seed: int) -> str:
    return f"{method.replace(' ', '_')}-seed{seed}"
