"""YAML is read as mappings, lists and text, and whatever else a file holds is refused quickly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.yaml_file import MAX_BYTES, MAX_DEPTH, Mapping, read_yaml


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.yaml"


def test_text_stays_as_it_is_written(file: Path) -> None:
    file.write_text(
        "a: 1e-3\nb: [010, 1:30, on, ~, '', '~', \"null\", 1_000]\n"
        "# no\nc:\nd: {e-f: x}\ng: |\n  h\n"
    )
    content = read_yaml(file)
    assert content == {
        "a": "1e-3",
        "b": ["010", "1:30", "on", None, "", "~", "null", "1_000"],
        "c": None,
        "d": {"e-f": "x"},
        "g": "h\n",
    }
    assert isinstance(content, Mapping)
    assert content.lines == {"a": 1, "b": 2, "c": 4, "d": 5, "g": 6}
    file.write_text("# nothing\n")
    assert read_yaml(file) is None


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3", "in line 3: the key a was already given in line 1"),
        ("x: {a: 1, 'a': 2}", "the key a was already given in line 1"),
        (BOMB, "in line 1: anchors and aliases"),
        ("a: *b", "in line 1: anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "in line 1: tags"),
        ("a: !!int 3", "in line 1: tags"),
        ("&a b: 3", "in line 1: anchors"),
        ("~: 3", "a key must be text"),
        ("a: " + "[" * 20_000, f"nested more than {MAX_DEPTH} deep"),
        ("{a: " * 20_000, f"nested more than {MAX_DEPTH} deep"),
        ("- " * 20_000, f"nested more than {MAX_DEPTH} deep"),
        ("? [a]\n: 1", "a key must be text"),
        ("---\na: 1\n---\nb: 1", "in line 3: a second document"),
        ("a: 1\n b: [", "is not YAML in line 2"),
        ("a: \x01", "is not YAML"),
        (b"a: \xff\xfe", "is not UTF-8 text"),
        ("a: 1\n" * (MAX_BYTES // 5 + 1), f"has more than {MAX_BYTES} bytes"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_refused_with_file_and_line(file: Path, content: str | bytes, message: str) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert message in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="is a named pipe"):
        read_yaml(tmp_path / "pipe.yaml")
