"""Flags, help and YAML keys come from the option dataclasses and from nowhere else."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from megatron_eslm.config.flags import (
    build_parser,
    field_help,
    flag_of,
    parse_groups,
    parse_options,
)
from megatron_eslm.config.run import GROUPS
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import ONE_OR_MORE, Among, Commas, Flag

FIELDS = [
    pytest.param(cls, field, id=field.name)
    for cls in GROUPS.values()
    for field in dataclasses.fields(cls)
]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample."""

    num_layers: int | None = None
    """How many,
    over two lines."""

    rate: float = 0.0
    """At 100% of it."""

    kind: Literal["one", "two"] = "one"
    """Which."""

    enabled: bool = True
    """Whether."""

    paths: tuple[str, ...] = ()
    """Several."""

    shares: Annotated[str, Commas()] = "1,1"
    """Several in one."""

    local_rank: int | None = None
    """Set by the launcher."""

    deepspeed_config: str | None = None
    """Engine's file."""


def parse(*argv: str) -> tuple[Sample, frozenset[str]]:
    parsed = parse_groups({"sample": Sample}, argv, "Test.")
    return parsed["sample"], parsed["given"]


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_option_has_help_and_a_default(cls: type, field: dataclasses.Field) -> None:
    assert field_help(cls).get(field.name), f"{cls.__name__}.{field.name} has no text under it"
    assert field.default is not dataclasses.MISSING


def test_no_option_is_owned_twice() -> None:
    names = [param.values[1].name for param in FIELDS]
    assert len(names) == len(set(names))


def test_help_shows_text_defaults_and_choices() -> None:
    text = " ".join(build_parser({"sample": Sample}, "Test.").format_help().split())
    assert "--num-layers INT How many, over two lines." in text
    assert "--rate FLOAT At 100% of it. [0.0]" in text
    assert "--kind {one,two} Which. [one]" in text
    assert "--enabled, --no-enabled" in text
    assert "--config FILE" in text


def test_help_of_the_whole_command_names_every_flag() -> None:
    text = build_parser(GROUPS, "Test.").format_help()
    for param in FIELDS:
        assert flag_of(param.values[1].name) in text


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parse() == (Sample(), frozenset())


def test_values() -> None:
    sample, given = parse(
        *("--num-layers", "3", "--rate=1e-3", "--kind", "two", "--no-enabled", "--paths", "a", "b")
    )
    assert sample == Sample(num_layers=3, rate=1e-3, kind="two", enabled=False, paths=("a", "b"))
    assert given == {"num_layers", "rate", "kind", "enabled", "paths"}


@pytest.mark.parametrize("flag", ["--local-rank", "--local_rank"])
def test_local_rank_in_both_spellings(flag: str) -> None:
    assert parse(f"{flag}=3")[0].local_rank == 3


@pytest.mark.parametrize("flag", ["--deepspeed-config", "--deepspeed_config"])
def test_deepspeed_config_in_both_spellings(flag: str) -> None:
    assert parse(flag, "x.json")[0].deepspeed_config == "x.json"


def test_every_literal_choice_is_accepted() -> None:
    for cls in GROUPS.values():
        for name, hint in typing.get_type_hints(cls).items():
            for part in (hint, *typing.get_args(hint)):
                if typing.get_origin(part) is Literal:
                    for choice in typing.get_args(part):
                        parsed = parse_groups({"group": cls}, [flag_of(name), str(choice)], "Test.")
                        assert getattr(parsed["group"], name) == choice


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-layer", "3"], "There is no option --num-layer. Did you mean --num-layers?"),
        (["--num-layer=3"], "Did you mean --num-layers?"),
        (["--zzzzqqq"], "There is no option --zzzzqqq. See --help for those there are."),
        (["--num-layers", "many"], "--num-layers: 'many' is not a whole number."),
        (["--num-layers", "2.5"], "--num-layers: '2.5' is not a whole number."),
        (["--rate", "fast"], "--rate: 'fast' is not a number."),
        (["--rate", "nan"], "--rate: nan is not a finite number."),
        (["--rate", "1e999"], "--rate: 1e999 is not a finite number."),
        (["--kind", "three"], "--kind: 'three' is not one of one, two."),
        (["--kind", "Two"], "Did you mean two?"),
        (["--rate"], "--rate: expected one argument."),
        (["stray"], "'stray' belongs to no option."),
        (["--rate", "1", "--rate", "2"], "--rate is given twice; leave one out."),
        (["--rate=1", "--rate=1"], "--rate is given twice; leave one out."),
        (["--enabled", "--no-enabled"], "--enabled and --no-enabled are given; leave one out."),
        (["--local-rank=1", "--local_rank=1"], "--local-rank and --local_rank are given"),
        (["--paths", "a", "--paths", "b"], "--paths is given twice; give all values after one."),
        (["--config", "a", "--config", "b"], "--config is given twice"),
        (["--config", ""], "--config: its value is empty"),
        (["--kin", "two"], "There is no option --kin."),  # no abbreviations
    ],
)
def test_what_cannot_be_used_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert message in str(caught.value)


@pytest.fixture
def from_yaml(tmp_path: Path) -> Callable[..., tuple[Sample, frozenset[str]]]:
    def parse_file(content: str, *argv: str) -> tuple[Sample, frozenset[str]]:
        file = tmp_path / "run.yaml"
        file.write_text(content)
        return parse(*argv, "--config", str(file))

    return parse_file


def test_yaml_sets_flags(from_yaml) -> None:
    sample, given = from_yaml(
        "num-layers: 4\nrate: 1e-3\nenabled: false\npaths: [a, 2, b]\nkind: two\nlocal_rank: null\n"
        "shares: [90, 10, 0]\n"
    )
    assert sample == Sample(
        num_layers=4, rate=1e-3, enabled=False, paths=("a", "2", "b"), kind="two", shares="90,10,0"
    )
    assert given == {"num_layers", "rate", "enabled", "paths", "kind", "shares"}


def test_flags_win_over_yaml(from_yaml) -> None:
    content = "num_layers: 4\nrate: 0.5\nenabled: false\n"
    sample, _ = from_yaml(content, "--num-layers", "7", "--enabled")
    assert (sample.num_layers, sample.rate, sample.enabled) == (7, 0.5, True)


@pytest.mark.parametrize(
    ("content", "field", "value"),
    [
        ("num_layers: 010", "num_layers", 10),
        ("--num-layers: '3'", "num_layers", 3),
        ("rate: 1e3", "rate", 1000.0),
        ("rate: -5", "rate", -5.0),
        ("enabled: False", "enabled", False),
        ("paths: one", "paths", ("one",)),
        ("paths: [1:30, on, 0x10, 2024-01-01]", "paths", ("1:30", "on", "0x10", "2024-01-01")),
        ("shares: 1", "shares", "1"),
        ("deepspeed-config: a.json", "deepspeed_config", "a.json"),
        ("rate:", "rate", 0.0),
    ],
)
def test_yaml_values_are_what_the_flag_makes_of_them(
    from_yaml, content: str, field: str, value: Any
) -> None:
    assert getattr(from_yaml(content)[0], field) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_layer: 3", "there is no option num_layer (line 1). Did you mean num_layers?"),
        ("wholly_unknown: 3", "there is no option wholly_unknown (line 1)."),
        ("config: other.yaml", "there is no option config (line 1)."),
        ("<<: {rate: 1}", "there is no option <<"),
        ("- 1\n- 2\n", "must be a mapping of flags to values."),
        ("", "must be a mapping of flags to values."),
        ("a: [1, ", "is not YAML in line"),
        ("rate: 1\nrate: 2", "in line 2: the key rate was already given in line 1"),
        ("local-rank: 1\nlocal_rank: 1", "gives --local-rank twice, in lines 1 and 2"),
        ("num_layers: many", ": num_layers: 'many' is not a whole number."),
        ("num_layers: 1:30", ": num_layers: '1:30' is not a whole number."),
        ("num_layers: ''", ": num_layers: '' is not a whole number."),
        ("rate: inf", ": rate: inf is not a finite number."),
        ("rate: .inf", ": rate: '.inf' is not a number."),
        ("rate: true", ": rate: 'true' is not a number."),
        ("enabled: 1", ": enabled must be true or false, not '1'."),
        ("enabled: on", ": enabled must be true or false, not 'on'."),
        ("enabled: [true]", ": enabled takes one value, not a list of 1."),
        ("kind: three", ": kind: 'three' is not one of one, two."),
        ("rate: [0.1, --kind, two]", ": rate takes one value, not a list of 3."),
        ("rate: {a: 1}", ": rate must be a value."),
        ("rate: [[1]]", ": rate must be a value."),
        ("paths: [a, [b]]", ": paths must be a value or a list of values."),
        ("paths: [a, null]", ": paths must be a value or a list of values."),
        ("paths: []", ": paths must be a value or a list of values."),
        ("paths: [a, --help]", ": paths: '--help' looks like a flag; give it a line of its own."),
        ("paths: --rate", "looks like a flag"),
        ("shares: [1, -h]", "looks like a flag"),
    ],
)
def test_yaml_that_cannot_be_used(from_yaml, content: str, message: str) -> None:
    """Refused with file and key, and never read as words of a command line."""
    with pytest.raises(ConfigError) as caught:
        from_yaml(content)
    assert message in str(caught.value) and "run.yaml" in str(caught.value)
    assert str(caught.value).startswith("--config ")


def test_yaml_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))


NAMES = {"one": 1}


@dataclass(frozen=True, kw_only=True)
class Command:
    """Of a command."""

    files: Annotated[tuple[str, ...], Flag(positional=True)]
    """Read."""

    output: Annotated[str, Flag(metavar="FILE", also="--out")]
    """Written."""

    prompts: Annotated[tuple[str, ...], Flag(repeated=True)] = ()
    """Any text."""

    only: tuple[int, ...] | None = None
    """Several."""

    count: Annotated[int, ONE_OR_MORE] = 3
    """How many."""

    name: Annotated[str, Among(NAMES)] = "one"
    """Which."""

    overwrite: bool = False
    """Replace."""


def command(words: str) -> Command:
    return parse_options(Command, words.split(" "), "Test.")


def test_flags_of_a_command() -> None:
    assert command("a --output b") == Command(files=("a",), output="b")
    assert command("a b --out c --prompts  --prompts x --only 1 2 --overwrite") == Command(
        files=("a", "b"), output="c", prompts=("", "x"), only=(1, 2), overwrite=True
    )
    text = build_parser({"command": Command}, None, config_file=False).format_help()
    for words in (
        "FILES [FILES ...]",
        "--output FILE, --out FILE",
        "How many. [3]",
        "--name {one}",
    ):
        assert words in text
    assert "--config" not in text and "--no-overwrite" not in text


def test_names_that_are_added_are_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    command("a --output b --name one")
    with pytest.raises(ConfigError, match="--name: 'two' is not one of one\\."):
        command("a --output b --name two")
    monkeypatch.setitem(NAMES, "two", 2)
    assert command("a --output b --name two").name == "two"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a", "the following arguments are required: --output/--out."),
        ("--output b", "the following arguments are required: FILES."),
        ("a --output b --out c", "--output and --out are given; leave one out."),
        ("a --output b --count 0", "--count 0 must be 1 or more."),
        ("a --output b --no-overwrite", "There is no option --no-overwrite."),
        ("a --output b --config c", "There is no option --config. Did you mean --count?"),
        ("a --output ", "--output is empty; give it a value, or leave it out."),
    ],
)
def test_what_a_command_refuses(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(words)
    assert str(caught.value).startswith(message)
