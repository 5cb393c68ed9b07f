"""Flags, their help and YAML keys, derived from option dataclasses.

A field's name is its flag, its annotation the type, the string under it the help. There is no
second list of options anywhere.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_eslm.errors import ConfigError


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def flag_of(name: str) -> str:
    """`--num-layers` for `num_layers`; DeepSpeed's own flag keeps its underscore."""
    return "--deepspeed_config" if name == "deepspeed_config" else f"--{name.replace('_', '-')}"


def _kind(annotation: Any) -> tuple[Any, tuple[Any, ...] | None, bool]:
    """(type of one value, choices, whether it takes several) of an annotation."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [a for a in args if a is not type(None)]
        return _kind(inner)
    if origin is typing.Literal:
        return type(args[0]), args, False
    if origin is tuple:
        return args[0], None, True
    return annotation, None, False


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one paragraph with the nearest flag, exit code 2."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown.split("=")[0], known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "See --help for those there are."
            message = f"There is no option {unknown}. {hint}"
        raise ConfigError(message)


Pages = Mapping[str, tuple[str, Callable[[], str]]]
"""Flags that, like --help, print a page and end: flag -> (its help, what writes the page)."""


class _ShowPage(argparse.Action):
    def __init__(self, page: Callable[[], str], **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)
        self._page = page

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        sys.stdout.write(self._page() + "\n")
        parser.exit()


def build_parser(
    groups: Mapping[str, type], description: str, pages: Pages | None = None
) -> argparse.ArgumentParser:
    """A parser with one group of flags per dataclass. Unset flags stay out of the namespace."""
    parser = _Parser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; flags win over it.")
    for flag, (text, page) in (pages or {}).items():
        parser.add_argument(flag, action=_ShowPage, page=page, help=text)
    for cls in groups.values():
        group = parser.add_argument_group((cls.__doc__ or cls.__name__).rstrip("."))
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kind, choices, several = _kind(hints[field.name])
            text = field_help(cls).get(field.name, "").replace("%", "%%")
            if not (field.default is None or field.default is False or field.default == ()):
                text += f" [{field.default}]"
            names = {flag_of(field.name), f"--{field.name.replace('_', '-')}"}
            if field.name == "local_rank":
                names.add("--local_rank")
            if kind is bool:
                group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
            else:
                group.add_argument(
                    *sorted(names),
                    dest=field.name,
                    type=kind,
                    choices=choices,
                    nargs="+" if several else None,
                    metavar=None if choices else kind.__name__.upper(),
                    help=text,
                )
    return parser


def read_yaml(path: str, known: Iterable[str]) -> dict[str, Any]:
    """Flags from a YAML mapping; keys may be written with - or _.

    Raises:
        ConfigError: the file is missing, is not a mapping, or has a key that is no flag.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of flags to values.")
    known = set(known)
    values = {str(key).lstrip("-").replace("-", "_"): value for key, value in content.items()}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--config {path}: there is no option {name}.{hint}")
    return values


def as_words(name: str, value: Any) -> list[str]:
    """A YAML value as the words it would be on the command line."""
    flag = flag_of(name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [flag, *map(str, values)]


def parse_groups(
    groups: Mapping[str, type], argv: Sequence[str], description: str, pages: Pages | None = None
) -> dict[str, Any]:
    """Parse `argv` into one option object per group. A flag of `pages` ends the process, as --help.

    Returns:
        {group name: instance, ..., "given": names of the flags that were set}.

    Raises:
        ConfigError: any flag or value that cannot be used.
    """
    parser = build_parser(groups, description, pages)
    names = {field.name for cls in groups.values() for field in dataclasses.fields(cls)}
    values = vars(parser.parse_args(list(argv)))
    if path := values.pop("config", None):
        words = [w for n, v in read_yaml(path, names).items() for w in as_words(n, v)]
        values = vars(parser.parse_args(words)) | values
    objects: dict[str, Any] = {}
    for group, cls in groups.items():
        own = {f.name for f in dataclasses.fields(cls)} & values.keys()
        objects[group] = cls(
            **{
                name: tuple(values[name]) if isinstance(values[name], list) else values[name]
                for name in own
            }
        )
    return {**objects, "given": frozenset(values)}
