"""An `.idx` and what may be wrong with it: every entry, not only the ends."""

from __future__ import annotations

import os
import re
import socket
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_eslm.data import index_file
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError

S = 40
"""Documents of the pair."""
LENGTHS, OFFSETS, STARTS = 34, 34 + 4 * S, 34 + 12 * S
"""Where the tables begin."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("written") / "a"
    texts = ["word " * (1 + n % 7) for n in range(S)]
    preprocess(["x"], str(prefix), ByteTokenizer(), documents=texts)
    return prefix


@pytest.fixture
def pair(written: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy to damage, checked in chunks of 7 entries."""
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes(Path(f"{written}{suffix}").read_bytes())
    monkeypatch.setattr(index_file, "_CHUNK", 7)
    return tmp_path / "a"


def refusal(prefix: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_index(str(prefix))
    assert str(prefix) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_it_says(pair: Path) -> None:
    for trust in (False, True):
        index = read_index(str(pair), trust=trust)
        assert (index.documents, len(index.lengths)) == (S, S)
        assert index.tokens == int(index.lengths.sum()) == len(index.ids())
        assert index.lengths[:8].tolist() == [6, 11, 16, 21, 26, 31, 36, 6]


@pytest.mark.parametrize("step", [1, 3, 7, 9, 25])
def test_last_ids(pair: Path, step: int) -> None:
    index = read_index(str(pair))
    ends = np.cumsum(index.lengths) - 1
    found = list(index.last_ids(step))
    numbers = [first + step * i for first, ids in found for i in range(len(ids))]
    assert numbers == list(range(0, S, step))
    np.testing.assert_array_equal(
        np.concatenate([ids for _, ids in found]), index.ids()[ends[::step]]
    )


def _entry(at: int, value: int, form: str = "<q"):
    return lambda data: data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def _pointers(value: int):
    """Entries 5 to 35 of the byte offsets."""
    return lambda d: d[: OFFSETS + 40] + struct.pack("<q", value) * 30 + d[OFFSETS + 280 :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-8], "is damaged: .* bytes, but its header implies"),
        (lambda data: data[:20], "ends inside its header"),
        (lambda data: b"", "is not a Megatron index"),
        (lambda data: b"PK" + data[2:], "is not a Megatron index"),
        (_entry(9, 2), "index version 2"),
        (_entry(17, 7, "<B"), "type code 7"),
        (_entry(17, 6, "<B"), "type code 6"),
        (_entry(LENGTHS, 5, "<i"), "longer than its index says"),
        (_entry(LENGTHS + 4 * 20, -5, "<i"), "sequence 20 has -5 tokens"),
        (_entry(LENGTHS, 7, "<i"), "truncated"),
        (_pointers(10**12), "has sequence 5 at byte 1000000000000, which is not where"),
        (_pointers(-(10**6)), "has sequence 5 at byte -1000000, which"),
        (_pointers(0), "has sequence 5 at byte 0, which"),
        (_entry(OFFSETS, 2), "has sequence 0 at byte 2, which"),
        (_entry(OFFSETS + 8 * 14, 1), "has sequence 14 at byte 1, which"),
        (_entry(OFFSETS + 8 * (S - 1), 0), "has sequence 39 at byte 0, which"),
        (_entry(STARTS, 1), "document 0 begin at sequence 1 of 40, which is out of order"),
        (_entry(STARTS + 8 * 6, 10**12), "document 6 begin at sequence 1000000000000 of 40"),
        (_entry(STARTS + 8 * 7, -1), "document 7 begin at sequence -1 of 40"),
        (_entry(STARTS + 8 * 8, 3), "document 8 begin at sequence 3 of 40"),
        (_entry(STARTS + 8 * 9, 41), "document 9 begin at sequence 41 of 40"),
        (_entry(STARTS + 8 * S, S - 1), "end at sequence 39 of 40"),
        (lambda data: data[:18] + struct.pack("<QQ", 0, 1) + data[:8], "the data set is empty"),
    ],
)
def test_what_is_damaged_is_named(pair: Path, change, says: str) -> None:
    idx = pair.with_suffix(".idx")
    idx.write_bytes(change(idx.read_bytes()))
    assert re.search(says, refusal(pair))


def test_no_flipped_bit_is_missed(pair: Path) -> None:
    """But the lowest of a document boundary, which makes another file that is right in itself."""
    idx = pair.with_suffix(".idx")
    good = idx.read_bytes()
    for bit in range(0, 8 * len(good), 7):
        if bit > 8 * STARTS and (bit - 8 * STARTS) % 64 == 0:
            continue
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        idx.write_bytes(data)
        refusal(pair)


def test_damaged_bin(pair: Path) -> None:
    data = pair.with_suffix(".bin").read_bytes()
    pair.with_suffix(".bin").write_bytes(data[:-100])
    assert "a.bin is truncated: it has" in refusal(pair)
    pair.with_suffix(".bin").write_bytes(data + b"xx")
    assert "longer than its index says" in refusal(pair)
    pair.with_suffix(".bin").write_bytes(b"")
    assert "the data set is empty" in refusal(pair)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize(
    ("replace", "says"),
    [
        (_pipe, "must be a regular file but is a named pipe"),
        (Path.mkdir, "must be a regular file but is a folder"),
        (_socket, "cannot be read"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
        (lambda path: None, r"there is no file .*preprocess_data"),
    ],
)
def test_what_is_no_file_is_refused(pair: Path, monkeypatch, suffix, replace, says) -> None:
    monkeypatch.chdir(pair.parent)
    path = pair.with_suffix(suffix)
    path.unlink()
    replace(path)
    with pytest.raises(ConfigError, match=says):
        read_index(str(pair))


def test_paths_that_name_nothing(pair: Path) -> None:
    assert f"Give the prefix without its suffix: {pair}." in refusal(pair.with_name("a.bin"))
    with pytest.raises(ConfigError, match="is not a path: embedded null byte"):
        read_index("a\0b")
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        read_index(f"{pair}.bin/b")


def test_more_documents_than_can_be_numbered(tmp_path: Path) -> None:
    """A file of holes: nothing of that size is read."""
    count = 2**31
    (tmp_path / "a.bin").write_bytes(b"x")
    with (tmp_path / "a.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, 1))
        file.truncate(34 + 12 * count + 8)
    with pytest.raises(ConfigError, match=r"a has 2,147,483,648 documents; .* 2,147,483,647 is"):
        read_index(str(tmp_path / "a"))
