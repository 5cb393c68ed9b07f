"""A recipe's content with its base merged in, and the values of its `${name}`.

`base` names another recipe, relative to this one, for what they share: model, data, machine, or
everything but a flag. `defaults`, `flags` and `methods` are merged key by key, `prepare` and
`after` follow the base's, and of all else the recipe's own wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_eslm.errors import ConfigError, did_you_mean
from megatron_eslm.files import yaml_file
from megatron_eslm.files.yaml_file import Value

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_MERGED = ("defaults", "flags", "methods")
_APPENDED = ("prepare", "after")
_FILLED_IN = ("output", "run:")
"""Beginnings of the names that the recipe itself gives values."""


def read_with_base(
    path: Path, given: Mapping[str, str]
) -> tuple[yaml_file.Mapping, dict[str, str]]:
    """Read a recipe file and the recipes that it is based on.

    Args:
        path: the recipe.
        given: values of `${name}` from the command line.

    Returns:
        All keys but `base` and `defaults`, and the value of each `${name}`.

    Raises:
        ConfigError: a file cannot be read or is no mapping, recipes are based on each other, or
            nothing uses one of the given values.
    """
    content, read = _read(path), [path.resolve()]
    values = _defaults(path, content) | dict(given)
    asked = set(_asked(content))
    while (base := content.pop("base", None)) is not None:
        if not isinstance(base, str):
            raise ConfigError(f"The recipe {path} cannot be used: 'base' must be text.")
        named = read[-1].parent / fill(base, values, path)
        if named.resolve() in read:
            raise ConfigError(f"The recipe {path} cannot be used: it is its own base.")
        read.append(named.resolve())
        shared = _read(named)
        asked |= set(_asked(shared))
        values = _defaults(named, shared) | values
        content = _merged(shared, content)
    _check_used(path, asked, given)
    content.pop("defaults", None)
    return content, values


def fill(text: str, values: Mapping[str, str], path: Path) -> str:
    """Put values, which may have `${name}` themselves, in the place of `${name}`.

    Raises:
        ConfigError: a name has no value, or its value needs itself.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            what = (
                "names no method"
                if name.startswith("run:")
                else f"has no value; give --set {name}=..."
            )
            raise ConfigError(f"The recipe {path} cannot be used: {match[0]} {what}")
        others = {other: text for other, text in values.items() if other != name}
        return fill(values[name], others, path)

    return _VARIABLE.sub(value, text)


def _read(path: Path) -> yaml_file.Mapping:
    try:
        content = yaml_file.read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except ConfigError as error:
        raise ConfigError(f"The recipe {error}") from error
    if not isinstance(content, yaml_file.Mapping):
        raise ConfigError(
            f"The recipe {path} cannot be used: it must be a mapping, as in `key: value`."
        )
    return content


def _defaults(path: Path, content: yaml_file.Mapping) -> dict[str, str]:
    given: Value = content.get("defaults") or yaml_file.Mapping()
    if not isinstance(given, dict) or not all(isinstance(each, str) for each in given.values()):
        raise ConfigError(
            f"The recipe {path} cannot be used: 'defaults' must be a mapping of names to values."
        )
    return {name: str(value) for name, value in given.items()}


def _merged(base: yaml_file.Mapping, own: yaml_file.Mapping) -> yaml_file.Mapping:
    merged = yaml_file.Mapping()
    for source in (base, own):
        for key, value in source.items():
            before = merged.get(key)
            if key in _MERGED and isinstance(before, yaml_file.Mapping):
                value = _merged(before, value) if isinstance(value, yaml_file.Mapping) else value
            elif key in _APPENDED and isinstance(before, list) and isinstance(value, list):
                value = [*before, *value]
            merged[key] = value
            merged.lines[key] = source.lines[key]
    return merged


def _check_used(path: Path, asked: set[str], given: Mapping[str, str]) -> None:
    """Refuse a value that nothing asks for: a misspelt name would be ignored."""
    for name in given:
        if name not in asked:
            has = ", ".join(sorted(asked)) or "none"
            raise ConfigError(
                f"--set {name}=...: the recipe {path} has no ${{{name}}}; it has {has}."
                f"{did_you_mean(name, sorted(asked))}"
            )


def _asked(content: Value) -> Iterator[str]:
    if isinstance(content, str):
        names = _VARIABLE.findall(content)
        yield from (name for name in names if not name.startswith(_FILLED_IN))
    elif content is not None:
        parts = content.values() if isinstance(content, dict) else content
        for part in parts:
            yield from _asked(part)
