"""The corpus out of the standard library."""

from __future__ import annotations

import ast
import multiprocessing
import os

import pytest

from megatron_eslm.data import demo_corpus
from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.demo_corpus import prepare_demo_corpus, split_docstrings
from megatron_eslm.data.source import open_data
from megatron_eslm.data.verify import verify_data
from megatron_eslm.errors import ConfigError

SOURCE = '''"""Module é text."""
import os

class A:
    """Class text.

    More.
    """

    def f(self): """One line."""

    async def g(self):
        \'\'\'Only text.\'\'\'

    def h(self):
        """With code."""; return "é" """not a docstring"""
'''


def test_split_docstrings():
    code, docs = split_docstrings("m", SOURCE)
    for text in ("Module é text", "Class text", "More.", "One line", "Only text", "With code"):
        assert text not in code
        assert text in docs
    assert "not a docstring" in code
    assert [ast.get_docstring(n) for n in ast.walk(ast.parse(code)) if hasattr(n, "body")] == [
        None
    ] * 5
    for name in ("m\n", "m.A\n", "m.A.f\n", "m.A.g\n", "m.A.h\n"):
        assert f"{name}\n" in docs
    assert split_docstrings("m", "def broken(") == ("def broken(", "")


@pytest.fixture
def small(monkeypatch):
    """A library small enough for a test."""
    monkeypatch.setattr(demo_corpus, "_SOURCE_BYTES", 300_000)
    monkeypatch.setattr(demo_corpus, "_DOCS_BYTES", 100_000)
    monkeypatch.setattr(demo_corpus, "_topics", lambda: ["A topic.\n" * 40])
    files = list(demo_corpus._library_files())[:60]
    assert len(files) == 60
    monkeypatch.setattr(demo_corpus, "_library_files", lambda: iter(files))


def test_prepare(tmp_path, small, monkeypatch):
    words = prepare_demo_corpus(str(tmp_path / "demo"), 600)
    assert words[1::2] == [
        str(tmp_path / "demo" / "python_source"),
        str(tmp_path / "demo" / "python_docs"),
    ]
    source = open_data(DataOptions(data_path=tuple(words)))
    assert source.tokenizer.vocab_size == 600
    assert [str(d.tokens) for d in source.domains] == words[::2]
    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "_build", None)  # a second call builds nothing
        assert prepare_demo_corpus(str(tmp_path / "demo"), 600) == words
    other = prepare_demo_corpus(str(tmp_path / "other"), 600)
    for name in ("python_source", "python_docs"):  # deterministic
        first, second = (tmp_path / d / f"{name}.bin" for d in ("demo", "other"))
        assert first.read_bytes() == second.read_bytes()
    assert other[::2] == words[::2]
    assert prepare_demo_corpus(str(tmp_path / "demo"), 500) != words


def test_a_failed_call_is_made_up_for(tmp_path, small, monkeypatch, caplog):
    folder = tmp_path / "demo"
    preprocess = demo_corpus.preprocess
    calls = []

    def dies_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return preprocess(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "preprocess", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            prepare_demo_corpus(str(folder), 600)
    assert os.listdir(tmp_path) == []
    folder.mkdir()
    (folder / "complete.json").write_text("{}")  # as an earlier version left it
    words = prepare_demo_corpus(str(folder), 600)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    text = folder / "python_docs.bin"
    text.write_bytes(bytes(text.stat().st_size))
    assert prepare_demo_corpus(str(folder), 600) == words
    assert "python_docs.bin is damaged: its contents have changed: building it" in caplog.text
    assert verify_data(words[3]).documents > 1
    assert sorted(os.listdir(tmp_path)) == ["demo", "demo.replaced"]


def test_two_demos_at_once(tmp_path, small):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def job() -> None:
        try:
            words = prepare_demo_corpus(str(tmp_path / "demo"), 600)
            results.put([verify_data(prefix).tokens for prefix in words[1::2]])
        except BaseException as error:
            results.put(repr(error))

    jobs = [fork.Process(target=job) for _ in range(2)]
    for process in jobs:
        process.start()
    first, second = (results.get(timeout=60) for _ in jobs)
    for process in jobs:
        process.join()
    assert first == second and len(first) == 2
    assert os.listdir(tmp_path) == ["demo"]


def test_no_library_and_no_room(tmp_path, monkeypatch, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="demo corpus cannot be written"):
        prepare_demo_corpus(str(tmp_path / "file" / "demo"))
    monkeypatch.undo()
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"no source in .*--data-path"):
        prepare_demo_corpus(str(tmp_path / "demo"))
