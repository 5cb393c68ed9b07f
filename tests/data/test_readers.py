"""Every input format gives back its documents; every broken input is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

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


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_round_trip(tmp_path, kind, documents):
    assert list(read_documents([write(tmp_path, kind, documents)])) == documents


def test_zst_chunks_smaller_than_a_line(tmp_path, documents, monkeypatch):
    monkeypatch.setattr("megatron_eslm.data.readers._CHUNK_BYTES", 11)
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


def test_hub_dataset_is_streamed(monkeypatch, documents):
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


def test_unknown_hub_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match="neither a file or folder here nor a Hugging Face"):
        list(read_documents(["owner/nothing"]))


def test_hub_dataset_that_breaks_off(monkeypatch):
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
        (b'["text"]', r"line 3 has no field 'text' \(it has no fields at all\)"),
        (b'{"text": null}', r"line 3: field 'text' holds NoneType"),
        (b'{"text": "\xff\xfe"}', "line 3 is not valid JSON"),
    ],
)
def test_broken_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")  # the empty line is passed over
    with pytest.raises(ConfigError, match=message):
        list(read_documents([str(path)]))


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet"])
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
        (str(tmp_path / "table.csv"), "of no kind that can be read"),
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
    with pytest.raises(ConfigError, match="row 2: field 'body' holds NoneType"):
        list(read_documents([str(tmp_path / "t.parquet")], "body"))


def test_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8"):
        list(read_documents([str(tmp_path / "latin.txt")]))
