"""What of a folder is read, what is left out, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_eslm.data.input_files import find_files
from megatron_eslm.errors import ConfigError

ENDINGS = [".jsonl", ".jsonl.gz", ".json", ".txt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("corpus/a.jsonl", "corpus/sub/b.jsonl", "elsewhere/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "corpus"


def found(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(folder, ENDINGS)]


def test_links_are_followed(folder, caplog):
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder / "z.txt").symlink_to(folder.parent / "elsewhere" / "d.txt")
    (folder.parent / "elsewhere" / "d.txt").touch()
    with pytest.raises(ConfigError, match=r"linked/d\.txt and .*z\.txt are the same through"):
        found(folder)
    (folder / "z.txt").unlink()
    assert found(folder) == ["a.jsonl", "linked/c.jsonl", "linked/d.txt", "sub/b.jsonl"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("sub/loop", ".", r"corpus and .*sub/loop are the same"),
        ("sub/loop", "..", r"corpus and .*sub/loop/corpus are the same"),
        ("again", "sub", r"sub and .*again are the same"),
        ("copy.jsonl", "a.jsonl", r"a\.jsonl and .*copy\.jsonl are the same"),
        ("gone", "nowhere", r"gone is a broken link"),
        ("self.jsonl", "self.jsonl", r"self\.jsonl is a broken link"),
    ],
)
def test_links_that_are_refused(folder, link, target, message):
    (folder / link).symlink_to(os.path.abspath(folder / target))
    with pytest.raises(ConfigError, match=message):
        found(folder)


def test_what_is_no_part_of_a_corpus_is_left_out_and_named(folder, caplog):
    for name in ("._a.jsonl", ".git/x.json", "sub/README.txt", "License.txt", "t.csv", "x.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert found(folder) == ["a.jsonl", "sub/b.jsonl"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{folder}: files to read: 2; left out: ._a.jsonl, .git, License.txt and 3 more"
    )


@pytest.mark.parametrize("other", ["a.jsonl.gz", "a.json", "a.txt"])
def test_one_text_in_two_forms_is_refused(folder, other):
    (folder / "sub" / other).touch()  # in another folder it is another file
    assert len(found(folder)) == 3
    (folder / other).touch()
    first, second = sorted(("a.jsonl", other))
    with pytest.raises(ConfigError, match=rf"/{first} and .*/{second} differ only in the suffix"):
        found(folder)


def test_folder_that_cannot_be_listed(folder, monkeypatch):
    real = Path.iterdir

    def iterdir(path):
        if path.name == "sub":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(ConfigError, match=r"corpus/sub cannot be read: Permission denied"):
        found(folder)
