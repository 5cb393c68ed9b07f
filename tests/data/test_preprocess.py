"""From text to the bytes that megatron-core reads."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.megatron_imports import indexed_dataset
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.source import open_data
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.data.verify import verify_data
from megatron_eslm.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path, documents) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return str(path)


def read_pair(prefix: str) -> list[list[int]]:
    data = indexed_dataset().IndexedDataset(prefix)
    return [np.array(data[i]).tolist() for i in range(len(data))]  # copied: the map dies with it


@pytest.mark.parametrize("append_eod", [True, False])
def test_megatron_core_reads_back_the_text(tmp_path, corpus, documents, gpt2, append_eod):
    prefix = str(tmp_path / "sub" / "out")  # the folder is made
    report = preprocess([corpus], prefix, gpt2, append_eod=append_eod)
    sequences = read_pair(prefix)
    assert report.documents == len(sequences) == len(documents)
    assert report.tokens == sum(map(len, sequences))
    assert report.text_bytes == sum(len(d.encode()) for d in documents)
    if append_eod:
        assert all(ids.pop() == gpt2.eod for ids in sequences)
    assert [gpt2.decode(ids) for ids in sequences] == documents
    source = open_data(DataOptions(data_path=(prefix,)))
    assert source.tokenizer.identity == gpt2.identity
    assert source.domains[0].tokens == report.tokens
    verified = verify_data(prefix)
    assert (verified.documents, verified.dtype) == (len(documents), "uint16")
    assert verified.sample.startswith(documents[0][:50])
    assert sorted(os.listdir(tmp_path / "sub")) == [
        "out.bin",
        "out.idx",
        "out.meta.json",
        "out.tokenizer",
    ]


def test_workers_write_the_same_bytes(tmp_path, corpus, gpt2, monkeypatch):
    monkeypatch.setattr("megatron_eslm.data.encode_pool._BATCH_CHARACTERS", 500)
    for workers in (1, 2):
        preprocess([corpus], str(tmp_path / f"w{workers}"), gpt2, workers=workers)
    for suffix in ("bin", "idx"):
        one, two = ((tmp_path / f"w{w}.{suffix}").read_bytes() for w in (1, 2))
        assert one == two


def test_large_vocabulary_is_int32(tmp_path, documents):
    class Wide(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size = 70_000

        def encode_arrays(self, texts):
            return [ids.astype(np.int32) + 69_000 for ids in super().encode_arrays(texts)]

    preprocess(["x"], str(tmp_path / "wide"), Wide(), documents=documents, append_eod=False)
    assert min(read_pair(str(tmp_path / "wide"))[0]) > 69_000
    assert (tmp_path / "wide.bin").stat().st_size == 4 * sum(len(d.encode()) for d in documents)


def test_empty_texts_are_left_out(tmp_path):
    report = preprocess(
        ["x"], str(tmp_path / "out"), ByteTokenizer(), documents=["", "one", "", "\ud800"]
    )
    assert (report.documents, report.empty_documents) == (2, 2)
    assert read_pair(str(tmp_path / "out")) == [[*b"one", 256], [*"\ufffd".encode(), 256]]


def test_existing_output(tmp_path, corpus, gpt2):
    prefix = str(tmp_path / "out")
    preprocess([corpus], prefix, gpt2)
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(ConfigError, match=r"out\.bin and .*out\.idx already exists.*--overwrite"):
        preprocess([corpus], prefix, ByteTokenizer())
    assert (tmp_path / "out.bin").read_bytes() == before
    preprocess([corpus], prefix, ByteTokenizer(), overwrite=True)
    assert open_data(DataOptions(data_path=(prefix,))).tokenizer.name == "ByteTokenizer"


def nothing_but(tmp_path: Path, *names: str) -> bool:
    return sorted(os.listdir(tmp_path)) == sorted(names)


def test_bad_input_leaves_nothing(tmp_path, corpus, gpt2):
    with open(corpus, "a") as file:
        file.write("{broken\n")
    for workers in (1, 2):
        with pytest.raises(ConfigError, match="line 121 is not valid JSON"):
            preprocess([corpus], str(tmp_path / "out"), gpt2, workers=workers)
    with pytest.raises(ConfigError, match="no document with any text"):
        preprocess(["x"], str(tmp_path / "out"), gpt2, documents=["", ""])
    for workers in (0, 1_000_000):
        with pytest.raises(ConfigError, match=f"--workers {workers}"):
            preprocess([corpus], str(tmp_path / "out"), gpt2, workers=workers)
    with pytest.raises(ConfigError, match="--log-interval -1 must be 0"):
        preprocess([corpus], str(tmp_path / "out"), gpt2, log_interval_seconds=-1)
    assert nothing_but(tmp_path, "corpus.jsonl")


def test_workers_that_the_system_does_not_start(tmp_path, corpus, gpt2, monkeypatch):
    """A limit on processes is named as such, and those that were started are gone."""
    fork, parent, forked = os.fork, os.getpid(), []

    def fork_once():
        if forked and os.getpid() == parent:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", fork_once)
    with pytest.raises(ConfigError, match=r"--workers: .* no more than 1 processes here"):
        preprocess([corpus], str(tmp_path / "out"), gpt2, workers=3)
    with pytest.raises(ProcessLookupError):
        os.kill(forked[0], 0)
    assert nothing_but(tmp_path, "corpus.jsonl")


def test_full_disk_and_missing_permission(tmp_path, corpus, gpt2, monkeypatch):
    import errno

    def no_space(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    builder = indexed_dataset().IndexedDatasetBuilder
    with monkeypatch.context() as patch:
        patch.setattr(builder, "add_document", no_space)
        with pytest.raises(ConfigError, match=r"--output-prefix .*No space left on device"):
            preprocess([corpus], str(tmp_path / "out"), gpt2)
    assert nothing_but(tmp_path, "corpus.jsonl")
    with pytest.raises(ConfigError, match=r"--output-prefix .* cannot be written"):
        preprocess([corpus], str(tmp_path / "corpus.jsonl" / "out"), gpt2)


def test_killed_worker_is_an_error(tmp_path, documents):
    class Fatal(ByteTokenizer):
        def encode_arrays(self, texts):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ConfigError, match="was killed, most likely for lack of memory"):
        preprocess(["x"], str(tmp_path / "out"), Fatal(), documents=documents, workers=2)
    assert nothing_but(tmp_path)


def start_tool(prefix: str, stdin: int) -> tuple[int, list[psutil.Process]]:
    """tools/preprocess_data.py, forked, that has started its workers and waits for more input.

    Its standard error goes to `PREFIX.stderr`.
    """
    pid = os.fork()
    if pid == 0:
        code: object = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(stdin, 0)
            os.dup2(os.open(f"{prefix}.stderr", os.O_WRONLY | os.O_CREAT), 2)
            sys.stdin, sys.stderr = os.fdopen(0), os.fdopen(2, "w")
            sys.argv = ["preprocess_data.py", "--input", "-", "--output-prefix", prefix]
            sys.argv += ["--tokenizer-type", "ByteTokenizer", "--workers", "2"]
            runpy.run_path(str(ROOT / "tools" / "preprocess_data.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + 60
    while len(workers := psutil.Process(pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pid, workers


def wait_until_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 20
    for process in processes:
        # A zombie is one that nobody waits for in this container.
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, process
            time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_run_leaves_no_process_and_no_data(tmp_path, corpus, gpt2, number, monkeypatch):
    """Workers end with their parent, however it ends; a second run is refused meanwhile; what a
    killed run leaves is no data and is removed by the next."""
    monkeypatch.setattr("megatron_eslm.data.encode_pool._BATCH_CHARACTERS", 100)
    prefix, (reader, writer) = str(tmp_path / "out"), os.pipe()
    os.write(writer, b'{"text": "many words"}\n' * 100)
    pid, workers = start_tool(prefix, reader)
    try:
        with pytest.raises(ConfigError, match=rf"--output-prefix {prefix} is being .* {pid} on"):
            preprocess([corpus], prefix, gpt2)
        os.kill(pid, number)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        wait_until_gone(workers)
    finally:
        for descriptor in (reader, writer):
            os.close(descriptor)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    said = (tmp_path / "out.stderr").read_text()
    if number == signal.SIGKILL:
        assert code == -9
        assert list(tmp_path.glob(".out.building-*"))
    else:
        assert code == 128 + number
        assert said == f"stopped by {number.name}; nothing of it is kept, give the command again\n"
        assert nothing_but(tmp_path, "corpus.jsonl", "out.stderr")
    with pytest.raises(ConfigError, match="there is no file"):
        open_data(DataOptions(data_path=(prefix,)))
    preprocess([corpus], prefix, gpt2)
    open_data(DataOptions(data_path=(prefix,)))
    files = ["out.bin", "out.idx", "out.meta.json", "out.stderr", "out.tokenizer"]
    assert nothing_but(tmp_path, "corpus.jsonl", *files)


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    def texts():
        yield "ours"
        (tmp_path / "out.bin").write_bytes(b"theirs")

    with pytest.raises(ConfigError, match=r"out\.bin already exists.*--overwrite"):
        preprocess(["x"], str(tmp_path / "out"), ByteTokenizer(), documents=texts())
    assert (tmp_path / "out.bin").read_bytes() == b"theirs"
    assert nothing_but(tmp_path, "out.bin")


@pytest.mark.parametrize("name", ["", ".", "folder", "folder/", "new/", "a\0b"])
def test_prefix_that_names_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"^--output-prefix .* (is a folder|is not a path)"):
        preprocess(["x"], name, ByteTokenizer(), documents=["text"])
    assert nothing_but(tmp_path, "folder")


def test_bad_lines_are_counted(tmp_path, corpus, documents, caplog):
    with open(corpus, "a") as file:
        file.write('{"text": null}\n{broken\n{"text": ""}\n')
    report = preprocess([corpus], str(tmp_path / "out"), ByteTokenizer(), on_bad_line="skip")
    assert (report.documents, report.empty_documents, report.bad_documents) == (120, 1, 2)
    assert "left out 1 documents without text and 2 bad ones" in caplog.text
    assert "line 121: field 'text' holds null" in caplog.messages[-1]


def test_index_appears_when_all_else_is_on_the_disk(tmp_path, monkeypatch):
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(file):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        sync(file)

    def move(a, b):
        done.append(f"-> {os.path.basename(b)}")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    preprocess(["x"], str(tmp_path / "out"), ByteTokenizer(), documents=["text"])
    moves = [event for event in done if event.startswith("->")]
    assert moves[-1] == "-> out.idx"
    before = done[: done.index(moves[0])]
    assert {"bin", "idx", "meta.json", "tokenizer", "tokenizer_meta.json"} <= set(before)
    assert done[done.index(moves[-1]) - 1] == done[-1] == tmp_path.name


def test_kill_while_publishing_over_old_files(tmp_path, corpus, gpt2, monkeypatch):
    """Wherever the renames stop, the pair is whole or refused."""
    prefix = str(tmp_path / "out")
    replace = os.replace
    for stop_after in range(4):
        preprocess([corpus], prefix, ByteTokenizer(), overwrite=True)
        left = [stop_after]

        def dying(a, b, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                preprocess([corpus], prefix, gpt2, overwrite=True)
        with pytest.raises(ConfigError):
            open_data(DataOptions(data_path=(prefix,)))


def test_file_of_megatron_without_facts(tmp_path, documents, gpt2, bpe_files):
    mcore = indexed_dataset()
    builder = mcore.IndexedDatasetBuilder(str(tmp_path / "old.bin"), dtype=np.int32)
    for document in documents:
        builder.add_item(torch.tensor([*gpt2.encode(document), gpt2.eod]))
        builder.end_document()
    builder.finalize(str(tmp_path / "old.idx"))
    options = DataOptions(data_path=(str(tmp_path / "old"),))
    with pytest.raises(ConfigError, match=r"its tokenizer is unknown.*--tokenizer-type"):
        open_data(options)
    options = dataclasses.replace(
        options,
        tokenizer_type="GPT2BPETokenizer",
        vocab_file=str(bpe_files / "vocab.json"),
        merge_file=str(bpe_files / "merges.txt"),
    )
    source = open_data(options)
    assert source.domains[0].documents == len(documents)
    assert verify_data(str(tmp_path / "old")).tokenizer is None
    bad = dataclasses.replace(
        options, tokenizer_type="ByteTokenizer", vocab_file=None, merge_file=None
    )
    ids = [i for d in documents for i in [*gpt2.encode(d), gpt2.eod]]
    first = next(n for n, i in enumerate(ids) if i >= 257)
    with pytest.raises(
        ConfigError,
        match=rf"old\.bin holds the id {ids[first]} at position {first}, outside .* of 257",
    ):
        open_data(bad)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a tool in this process; returns exit code, output and errors."""

    def run(name: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        return (end.value.code, *capsys.readouterr())

    return run


def test_tools(tmp_path, corpus, run_here):
    prefix = str(tmp_path / "out")
    made = subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", "-",
            "--output-prefix", prefix, "--on-bad-line", "skip", "--tokenizer-type",
            "ByteTokenizer", "--workers", "2", "--append-eod",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        input=Path(corpus).read_text() + '{"text": null}\n',
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "docs/s" in made.stdout
    assert "1 bad ones (the first: standard input, line 121: " in made.stdout
    assert "MB/s" in made.stdout
    code, out, err = run_here("verify_data.py", prefix)
    assert code == 0, err
    assert "120 documents" in out
    assert "0: " in out
    with open(f"{prefix}.bin", "r+b") as file:
        file.write(b"x")
    code, _, err = run_here("verify_data.py", prefix)
    assert code == 2
    assert "checksum" in err
    assert "Traceback" not in err
    code, _, err = run_here(
        "preprocess_data.py", "--input", corpus, "--output-prefix", prefix,
        "--tokenizer-type", "GPT2BPETokenizer",
    )  # fmt: skip
    assert code == 2
    assert err.startswith("error: --tokenizer-type GPT2BPETokenizer needs --vocab-file")


def test_verify_finds_what_open_data_does_not_read(tmp_path, corpus, gpt2):
    prefix = str(tmp_path / "out")
    preprocess([corpus], prefix, gpt2)
    ids = bytearray((tmp_path / "out.bin").read_bytes())
    ids[20] ^= 1
    (tmp_path / "out.bin").write_bytes(ids)
    open_data(DataOptions(data_path=(prefix,)))
    with pytest.raises(ConfigError, match=r"out\.bin is damaged or from another run: its checksum"):
        verify_data(prefix)
