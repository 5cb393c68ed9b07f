"""Every input format gives back its documents; every broken input is named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
from pathlib import Path

import pytest
import zstandard

from megatron_eslm.data.bad_lines import BadLines
from megatron_eslm.data.readers import read_documents
from megatron_eslm.errors import ConfigError


def as_jsonl(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": d, "meta": {}}).encode() + b"\n" for d in documents)


def write(folder: Path, kind: str, documents: list[str]) -> str:
    path = folder / f"corpus{kind}"
    data = as_jsonl(documents)
    if kind == ".jsonl":
        path.write_bytes(data.rstrip(b"\n"))  # no newline at the end
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(data))
    elif kind == ".jsonl.bz2":
        path.write_bytes(bz2.compress(data))
    elif kind == ".jsonl.xz":
        path.write_bytes(lzma.compress(data))
    elif kind == ".jsonl.zst":
        half = data.index(b"\n", len(data) // 2) - 7  # frames may end inside a line
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(data[:half]) + compress(data[half:]))
    elif kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": documents, "n": list(range(len(documents)))})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    return str(path)


@pytest.mark.parametrize(
    "kind", [".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet"]
)
def test_round_trip(tmp_path, kind, documents):
    assert list(read_documents([write(tmp_path, kind, documents)])) == documents


def test_zst_chunks_smaller_than_a_line(tmp_path, documents, monkeypatch):
    monkeypatch.setattr("megatron_eslm.data.json_lines._CHUNK_BYTES", 11)
    assert list(read_documents([write(tmp_path, ".jsonl.zst", documents)])) == documents


def test_txt_is_one_document_and_folders_are_sorted(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second\n\nstill second")
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "ignored.csv").write_text("x")
    assert list(read_documents([str(tmp_path)])) == ["first", "second\n\nstill second", "third"]


@pytest.mark.parametrize("in_dict", [False, True])
def test_saved_dataset(tmp_path, documents, in_dict):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"body": documents})
    (datasets.DatasetDict({"train": dataset}) if in_dict else dataset).save_to_disk(tmp_path / "d")
    assert list(read_documents([str(tmp_path / "d")], "body")) == documents
    with pytest.raises(ConfigError, match="no column 'text'"):
        list(read_documents([str(tmp_path / "d")]))


@pytest.fixture
def hub(monkeypatch):
    """A hub that has every data set."""
    monkeypatch.setattr("megatron_eslm.data.readers.check_data_set", lambda flag, name: None)


def test_evident_paths_ask_no_hub(monkeypatch, tmp_path):
    """A mistyped relative path used to wait for the hub for half a minute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    monkeypatch.setattr("megatron_eslm.data.readers.check_data_set", None)
    for name in ("corpus/missing", "./train", "a/b/c", "train.jsonl", "~/train"):
        with pytest.raises(ConfigError, match=f"no file or folder {name}"):
            list(read_documents([name]))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    def unreachable(self, name, *, repo_type, timeout):
        assert (name, repo_type) == ("owner/name", "dataset")
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    with pytest.raises(ConfigError, match=r"--input owner/name .* \(no route to host\)"):
        list(read_documents(["owner/name:en"]))


def test_hub_dataset_is_streamed(hub, monkeypatch, documents):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(name, config, split, streaming):
        asked.update(name=name, config=config, split=split, streaming=streaming)
        return datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents(["owner/name:en:validation"])) == documents
    assert asked == {
        "name": "owner/name",
        "config": "en",
        "split": "validation",
        "streaming": True,
    }


def test_unknown_hub_dataset(hub, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match="neither a file or folder here nor a Hugging Face"):
        list(read_documents(["owner/nothing"]))


def test_hub_dataset_that_breaks_off(hub, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def rows():
        yield {"text": "one"}
        raise ConnectionError("gone")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(rows)
    )
    reader = read_documents(["owner/name"])
    with pytest.raises(ConfigError, match="owner/name cannot be read beyond row"):
        list(reader)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "unfinished', r"bad\.jsonl, line 3 is not valid JSON"),
        (b'{"body": "x"}', r"line 3 has no field 'text' \(it has 'body'\).*--text-key"),
        (b'["text"]', r"line 3 is not a JSON object \(it has no fields\)"),
        (b'{"text": null}', r"line 3: field 'text' holds null"),
        (b'{"text": 5}', r"line 3: field 'text' holds a number"),
        (b'{"text": "\xff\xfe"}', "line 3 is not UTF-8 text"),
        (b'{"text": "x", "text": "y"}', "line 3 gives the field 'text' twice"),
        (b'{"text": "x", "deep": ' + b"[" * 200_000, "line 3 is nested too deep"),
        (b"\0" * 4096, "line 3 is not valid JSON"),
    ],
    ids=range(9),
)
def test_broken_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")  # the empty line is passed over
    with pytest.raises(ConfigError, match=message) as caught:
        list(read_documents([str(path)]))
    assert "--on-bad-line skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    with open(path, "ab") as file:
        file.write(b'{"text": "also good"}\n')
    bad = BadLines("skip")
    assert list(read_documents([str(path)], bad=bad)) == ["good", "also good"]
    assert bad.count == 1
    assert re.search(message.split(".*")[0], bad.first)


@pytest.mark.parametrize(
    "line",
    [
        b'\xef\xbb\xbf{"text": "x"}',
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
        b'{"text": "x", "n": 1, "n": 2, "meta": {"text": 1, "text": 2}}',
    ],
    ids=["byte order mark", "long number", "another field twice"],
)
def test_odd_lines_that_are_right(tmp_path, line):
    (tmp_path / "odd.jsonl").write_bytes(line + b"\n")
    assert list(read_documents([str(tmp_path / "odd.jsonl")])) == ["x"]


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", [[{"text": "one"}], {"text": "one"}])
def test_whole_files_of_json_are_no_lines(tmp_path, policy, indent, value):
    path = tmp_path / "array.json"
    path.write_text(json.dumps(value, indent=indent))
    if indent is None and isinstance(value, dict):
        assert list(read_documents([str(path)])) == ["one"]
        return
    with pytest.raises(ConfigError, match=r"array\.json begins like a single JSON value.*jq"):
        list(read_documents([str(path)], bad=BadLines(policy)))


def test_skipping_everything_is_an_error(tmp_path):
    path = tmp_path / "wrong_key.jsonl"
    path.write_bytes(as_jsonl(["one", "two"]))
    with pytest.raises(ConfigError, match=r"all lines are bad \(2\). The first: .*'body'"):
        list(read_documents([str(tmp_path)], "body", BadLines("skip")))


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_file(tmp_path, kind, damage, documents):
    path = Path(write(tmp_path, kind, documents))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 40] if damage == "truncated" else b"not this format\n" * 9)
    with pytest.raises(ConfigError, match=path.name):
        list(read_documents([str(path)]))


def test_missing_inputs(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.jsonl").write_bytes(b"\n\n")
    (tmp_path / "table.csv").write_bytes(b"a,b")
    for name, message in [
        (str(tmp_path / "absent.jsonl"), "There is no file or folder"),
        ("absent.jsonl", "There is no file or folder absent.jsonl"),
        (str(tmp_path / "empty"), "holds no file that can be read"),
        (str(tmp_path / "nothing.jsonl"), "holds no document"),
        (str(tmp_path / "table.csv"), "unsupported file type"),
    ]:
        with pytest.raises(ConfigError, match=message):
            list(read_documents([name]))
    with pytest.raises(ConfigError, match="No input"):
        list(read_documents([]))


def test_columns_and_values_of_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"no column 'text' \(it has 'body'\)"):
        list(read_documents([str(tmp_path / "t.parquet")]))
    with pytest.raises(ConfigError, match="row 2: field 'body' holds null"):
        list(read_documents([str(tmp_path / "t.parquet")], "body"))
    bad = BadLines("skip")
    assert list(read_documents([str(tmp_path / "t.parquet")], "body", bad)) == ["x"]
    assert bad.count == 1


def test_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8"):
        list(read_documents([str(tmp_path / "latin.txt")]))
    (tmp_path / "utf.txt").write_text("café")
    bad = BadLines("skip")
    assert list(read_documents([str(tmp_path)], bad=bad)) == ["café"]
    assert bad.count == 1


def test_standard_input(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n{"text": 1}\n'))
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(ConfigError, match="standard input, line 2: field 'text'"):
        list(read_documents(["-"]))
    with pytest.raises(ConfigError, match="twice"):
        list(read_documents(["-", "x.jsonl", "-"]))
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ConfigError, match="nothing is piped in"):
        list(read_documents(["-"]))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in (tmp_path / "pipe.jsonl", tmp_path):  # alone and in a folder
        with pytest.raises(ConfigError, match=r"pipe\.jsonl must be a regular file"):
            list(read_documents([str(name)]))
    with pytest.raises(ConfigError, match=r"'a\\x00b' cannot be read"):
        list(read_documents(["a\0b"]))
    with pytest.raises(ConfigError, match="File name too long"):
        list(read_documents(["x" * 5000]))
