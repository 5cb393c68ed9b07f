import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import parse_json, read_json, read_text
from megatron_eslm.files.schema import STRICT, Count, Size, parse_as, read_as


def test_reads_what_json_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, null, true], "é": {"b": "c"}}')
    assert read_json(path) == {"a": [1, 2.5, None, True], "é": {"b": "c"}}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        (b"[" + b"1" * 5000 + b"]", "is not JSON"),
        (b" " * 2000, "more than 1000 bytes"),
    ],
)
def test_names_the_file_and_the_reason(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    limit = {"max_bytes": 1000} if "1000" in says else {}
    with pytest.raises(ConfigError, match=says) as caught:
        read_json(path, **limit)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_what_is_no_file_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done: list[str] = []

    def read() -> None:
        for path in (pipe, tmp_path, "/dev/zero", "a\0b"):
            with pytest.raises(ConfigError) as caught:
                read_text(path)
            done.append(str(caught.value))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert [text.split()[-1] for text in done[:3]] == ["pipe.", "folder.", "device."]
    assert "not a path" in done[3]


@dataclass(frozen=True, kw_only=True)
class _Inner:
    __pydantic_config__ = STRICT
    size: Size
    name: str


@dataclass(frozen=True, kw_only=True)
class _Outer:
    __pydantic_config__ = STRICT
    inner: tuple[_Inner, ...]
    shape: tuple[int, ...] = ()
    count: Count | None = None
    share: float = 0.0


def test_a_schema_gives_the_dataclass(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"inner": [{"size": 2, "name": "x"}], "shape": [3, 4], "share": 1}')
    assert read_as(_Outer, path) == _Outer(
        inner=(_Inner(size=2, name="x"),), shape=(3, 4), share=1.0
    )
    assert parse_as(dict[str, int], {"a": 1}, "x") == {"a": 1}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([], "top level"),
        (None, "top level"),
        ({}, "inner"),
        ({"inner": "x"}, "inner"),
        ({"inner": [{"size": 0, "name": "x"}]}, "inner.0.size"),
        ({"inner": [{"size": 2**40, "name": "x"}]}, "inner.0.size"),
        ({"inner": [{"size": "2", "name": "x"}]}, "inner.0.size"),
        ({"inner": [{"size": True, "name": "x"}]}, "inner.0.size"),
        ({"inner": [{"size": 2, "name": 5}]}, "inner.0.name"),
        ({"inner": [], "shape": [1.5]}, "shape.0"),
        ({"inner": [], "count": -1}, "count"),
        ({"inner": [], "count": 2**70}, "count"),
        ({"inner": [], "share": float("nan")}, "share"),
        ({"inner": [], "share": float("inf")}, "share"),
        ({"inner": [], "other": 1}, "other"),
    ],
)
def test_a_schema_names_what_does_not_fit(value: object, names: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.json") as caught:
        parse_as(_Outer, value, "a.json")
    assert f"{names}: " in str(caught.value) and "\n" not in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class _Even:
    __pydantic_config__ = STRICT
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ConfigError(f"{self.number} is odd.")


def test_a_dataclass_that_checks_itself_says_why() -> None:
    with pytest.raises(ConfigError, match=r"^a\.json has invalid contents: top level: 3 is odd\.$"):
        parse_as(_Even, {"number": 3}, "a.json")


def test_values_that_are_nested_deep_do_not_fit() -> None:
    for depth in (250, 900, 100_000):
        value: dict = {}
        for _ in range(depth):
            value = {"a": value}
        with pytest.raises(ConfigError, match=r"a\.json has invalid contents"):
            parse_as(dict[str, Any], value, "a.json")


def test_lines_of_a_file_are_named() -> None:
    with pytest.raises(ConfigError, match="line 3"):
        parse_json("{", "a.jsonl, line 3")
