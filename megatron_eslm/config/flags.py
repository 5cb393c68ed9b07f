"""Flags, their help and YAML keys, derived from option dataclasses.

A field's name gives the flag, its annotation the type, the string below it the help. No second list
of options exists.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_eslm.command_line import OnOff, Parser, finite_number, not_among, whole_number
from megatron_eslm.errors import ConfigError, did_you_mean
from megatron_eslm.files import yaml_file
from megatron_eslm.limits import Among, Commas, Flag, check_fields, flag_of, metadata


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


def _kind(annotation: Any) -> tuple[Any, tuple[Any, ...] | None, bool]:
    """Parse an annotation into (type of one value, choices, whether it takes several)."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [a for a in args if a is not type(None)]
        return _kind(inner)
    if origin is typing.Literal:
        return type(args[0]), args, False
    if origin is tuple:
        return args[0], None, True
    return annotation, None, False


@dataclass(frozen=True)
class Option:
    """One option: the values that its flag and its YAML key take."""

    name: str
    kind: Any
    choices: Collection[Any] | None
    several: bool
    """Whether it takes more than one value."""
    commas: bool
    """Whether its value is a list between commas."""
    written: Flag
    """How it stands on the command line."""

    @property
    def flag(self) -> str:
        """The flag as on the command line."""
        return flag_of(self.name)

    def value(self, given: yaml_file.Value, where: str) -> Any:
        """Convert a YAML value to the field's value.

        Args:
            given: text, or a list of texts where the option takes several.
            where: file and key, for messages.

        Raises:
            ConfigError: the flag would not take the value.
        """
        texts = self._texts(given, where)
        values = tuple(self._one(text, where) for text in texts)
        return values if self.several else values[0]

    def words(self, given: yaml_file.Value, where: str) -> list[str]:
        """Command-line words for a YAML value, spelled as in the file; ConfigError as `value`."""
        value = self.value(given, where)
        if self.kind is bool:
            return [self.flag if value else f"--no-{self.name.replace('_', '-')}"]
        return [self.flag, *self._texts(given, where)]

    def _texts(self, given: yaml_file.Value, where: str) -> list[str]:
        items = given if isinstance(given, list) else [given]
        texts = [item for item in items if isinstance(item, str)]
        if len(texts) < len(items) or not items:
            raise ConfigError(f"{where} must be a value{' or a list of values' * self._listed}.")
        if isinstance(given, list) and not self._listed:
            raise ConfigError(f"{where} takes one value, not a list of {len(texts)}.")
        for text in texts:
            if re.match(r"--|-[A-Za-z]", text):
                raise ConfigError(
                    f"{where}: {text!r} looks like a flag; give it a line of its own."
                )
        return [",".join(texts)] if self.commas else texts

    @property
    def _listed(self) -> bool:
        return self.several or self.commas

    def _one(self, text: str, where: str) -> Any:
        if self.choices is not None and text not in self.choices:
            raise ConfigError(f"{where}: {not_among(text, self.choices)}")
        if self.kind is bool:
            if text.lower() not in ("true", "false"):
                raise ConfigError(f"{where} must be true or false, not {text!r}.")
            return text.lower() == "true"
        try:
            return {int: whole_number, float: finite_number}.get(self.kind, self.kind)(text)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"{where}: {error}.") from error


@functools.cache
def _options_of(cls: type) -> dict[str, Option]:
    plain, full = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    found = {}
    for name in (field.name for field in dataclasses.fields(cls)):
        kind, choices, several = _kind(plain[name])
        among = metadata(full[name], Among)
        found[name] = Option(
            name,
            kind,
            choices if among is None else among.names,
            several,
            commas=metadata(full[name], Commas) is not None,
            written=metadata(full[name], Flag) or Flag(),
        )
    return found


def options(groups: Mapping[str, type]) -> dict[str, Option]:
    """All options of some dataclasses, by field name."""
    return {name: option for cls in groups.values() for name, option in _options_of(cls).items()}


Pages = Mapping[str, tuple[str, Callable[[], str]]]
"""Flags that print a page and exit, like --help: flag -> (its help, function that writes it)."""


class _ShowPage(argparse.Action):
    def __init__(self, page: Callable[[], str], **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)
        self._page = page

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        sys.stdout.write(self._page() + "\n")
        parser.exit()


def build_parser(
    groups: Mapping[str, type],
    description: str | None,
    pages: Pages | None = None,
    *,
    config_file: bool = True,
) -> argparse.ArgumentParser:
    """A parser with one group of flags per dataclass. Unset flags stay out of the namespace.

    Args:
        groups: names and dataclasses. A field without a default is a flag that must be given.
        description: first paragraph of the help and what follows it.
        pages: flags that print a page.
        config_file: whether there is --config. Without it nothing but a flag can switch an option
            on, so what is off by default has no --no- form.
    """
    parser = Parser(description, argument_default=argparse.SUPPRESS)
    if config_file:
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file of flags; flags win over it."
        )
    for flag, (text, page) in (pages or {}).items():
        parser.add_argument(flag, action=_ShowPage, page=page, help=text)
    for cls in groups.values():
        group = parser.add_argument_group((cls.__doc__ or cls.__name__).rstrip("."))
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for option in _options_of(cls).values():
            text = field_help(cls).get(option.name, "").replace("%", "%%")
            _add_option(group, option, text, defaults[option.name], config_file=config_file)
    return parser


def _add_option(group: Any, option: Option, text: str, default: Any, *, config_file: bool) -> None:
    """Add one option, with `text` as its help, to a parser or a group of it."""
    required = default is dataclasses.MISSING
    if not (required or default is None or default is False or default == ()):
        text += f" [{default}]"
    metavar = option.written.metavar or option.kind.__name__.upper()
    if option.written.positional:
        nargs = "+" if option.several else None
        metavar = option.written.metavar or option.name.upper()
        group.add_argument(option.name, type=option.kind, nargs=nargs, metavar=metavar, help=text)
        return
    names = sorted({option.flag, f"--{option.name.replace('_', '-')}"})
    if option.name == "local_rank":
        names.append("--local_rank")
    if option.written.also is not None:
        names.append(option.written.also)
    if option.kind is bool:
        action = OnOff if config_file or default else "store_true"
        group.add_argument(*names, action=action, help=text)
    elif option.written.repeated:
        group.add_argument(
            *names, action="append", type=str, required=required, metavar=metavar, help=text
        )
    else:
        group.add_argument(
            *names,
            dest=option.name,
            type=option.kind,
            choices=option.choices,
            nargs="+" if option.several else None,
            metavar=metavar if option.choices is None else None,
            required=required,
            help=text,
        )


def by_field_name(
    said: yaml_file.Mapping, known: Collection[str], where: str, more: Collection[str] = ()
) -> dict[str, yaml_file.Value]:
    """Map a YAML mapping of flags to field names.

    Args:
        said: keys may be written with - or _. Keys without a value (`key:`, `key: null`) are
            dropped.
        known: names of options.
        where: the file, for messages.
        more: further names that are allowed.

    Raises:
        ConfigError: a key is not an option, or an option occurs twice.
    """
    found: dict[str, yaml_file.Value] = {}
    lines: dict[str, int] = {}
    for key, value in said.items():
        name = key.lstrip("-").replace("-", "_")
        line = said.lines[key]
        if name not in known and name not in more:
            hint = did_you_mean(name, [*known, *more])
            raise ConfigError(f"{where}: there is no option {name} (line {line}).{hint}")
        if name in lines:
            raise ConfigError(
                f"{where} gives {flag_of(name)} twice, in lines {lines[name]} and {line}; leave "
                "one of them out."
            )
        lines[name] = line
        if value is not None:
            found[name] = value
    return found


def _values_of_file(path: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """The values that the YAML file of --config sets."""
    try:
        content = yaml_file.read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from error
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from error
    if not isinstance(content, yaml_file.Mapping):
        raise ConfigError(f"--config {path} must be a mapping of flags to values.")
    said = by_field_name(content, known, f"--config {path}")
    return {
        name: known[name].value(value, f"--config {path}: {name}") for name, value in said.items()
    }


def parse_groups(
    groups: Mapping[str, type],
    argv: Sequence[str],
    description: str | None,
    pages: Pages | None = None,
    *,
    config_file: bool = True,
) -> dict[str, Any]:
    """Parse `argv` into one option object per group. Flags in `pages` exit the process, as --help.

    Args:
        groups, description, pages, config_file: as for `build_parser`.
        argv: without the name of the program.

    Returns:
        {group name: instance, ..., "given": names of the flags that were set}.

    Raises:
        ConfigError: a flag or value cannot be used.
    """
    parser = build_parser(groups, description, pages, config_file=config_file)
    values = vars(parser.parse_args(list(argv)))
    if path := values.pop("config", None) if config_file else None:
        values = _values_of_file(path, options(groups)) | values
    objects: dict[str, Any] = {}
    for group, cls in groups.items():
        own = {f.name for f in dataclasses.fields(cls)} & values.keys()
        objects[group] = cls(
            **{
                name: tuple(values[name]) if isinstance(values[name], list) else values[name]
                for name in own
            }
        )
        check_fields(objects[group])
    return {**objects, "given": frozenset(values)}


Options = TypeVar("Options")


def parse_options(cls: type[Options], argv: Sequence[str], description: str | None) -> Options:
    """Parse the flags of a command whose options are one dataclass, without --config.

    Raises:
        ConfigError: any flag or value that cannot be used.
    """
    return parse_groups({"options": cls}, argv, description, config_file=False)["options"]
