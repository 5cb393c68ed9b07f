"""Flags, help and YAML keys come from the option dataclasses and from nowhere else."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from megatron_eslm.config.flags import build_parser, field_help, flag_of, parse_groups
from megatron_eslm.config.run import GROUPS
from megatron_eslm.errors import ConfigError

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
        (["--num-layers", "many"], "argument --num-layers: invalid int value: 'many'"),
        (["--kind", "three"], "argument --kind: invalid choice: 'three'"),
        (["--rate"], "argument --rate: expected one argument"),
        (["--kin", "two"], "There is no option --kin."),  # no abbreviations
    ],
)
def test_what_cannot_be_used_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert message in str(caught.value)


def test_yaml_sets_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "num-layers: 4\nrate: 1e-3\nenabled: false\npaths: [a, 2, b]\nkind: two\nlocal_rank: null\n"
    )
    sample, given = parse("--config", str(file))
    assert sample == Sample(
        num_layers=4, rate=1e-3, enabled=False, paths=("a", "2", "b"), kind="two"
    )
    assert given == {"num_layers", "rate", "enabled", "paths", "kind"}


def test_flags_win_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("num_layers: 4\nrate: 0.5\nenabled: false\n")
    sample, _ = parse("--num-layers", "7", "--config", str(file), "--enabled")
    assert (sample.num_layers, sample.rate, sample.enabled) == (7, 0.5, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"num_layer: 3", "there is no option num_layer. Did you mean num_layers?"),
        (b"wholly_unknown: 3", "there is no option wholly_unknown."),
        (b"config: other.yaml", "there is no option config."),
        (b"- 1\n- 2\n", "must be a mapping of flags to values."),
        (b"", "must be a mapping of flags to values."),
        (b"a: [1, ", "cannot be read"),
        (b"rate: \xff\xfe", "cannot be read"),
        (b"num_layers: many", "argument --num-layers: invalid int value: 'many'"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file))
    assert message in str(caught.value)
    assert "num_layers" in message or str(file) in str(caught.value) or "argument" in message


def test_yaml_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))
