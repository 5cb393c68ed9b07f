"""Corpora of many files: the same bytes however they are divided and whenever they are killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard

from megatron_eslm.__main__ import main
from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.index_writer import write_index
from megatron_eslm.data.input_list import expand_inputs
from megatron_eslm.data.megatron_imports import indexed_dataset
from megatron_eslm.data.merge_pairs import merge_pairs
from megatron_eslm.data.parts.domain_names import SLIMPAJAMA
from megatron_eslm.data.parts.merge import merge_parts
from megatron_eslm.data.parts.preprocess import preprocess_in_parts
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.source import open_data
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.data.verify import verify_data
from megatron_eslm.errors import ConfigError
from tests.data.conftest import make_documents

KEY = "meta.redpajama_set_name"
VALUES = list(SLIMPAJAMA)


def by_domain(documents: list[str]) -> dict[str, list[str]]:
    return {name: documents[n::7] for n, name in enumerate(SLIMPAJAMA.values())}


@pytest.fixture
def tree(tmp_path, documents) -> Path:
    """chunk1/0.jsonl.zst and so on, domains mixed in each, as SlimPajama ships."""
    folder = tmp_path / "slimpajama"
    for number in range(6):
        path = folder / f"chunk{number // 2}" / f"{number}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"text": text, "meta": {"redpajama_set_name": VALUES[n % 7]}})
            for n, text in enumerate(documents)
            if n // 20 == number
        ]
        path.write_bytes(zstandard.compress(("\n".join(lines) + "\n").encode()))
    return folder


class SlowTokenizer(ByteTokenizer):
    """Slow enough that kills hit, each at another place."""

    def encode_arrays(self, texts):
        time.sleep(0.02)
        return super().encode_arrays(texts)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(tree: Path, prefix: Path, tokenizer, **options) -> list[Path]:
    return preprocess_in_parts([str(tree)], str(prefix), tokenizer, split_key=KEY, **options)


def test_any_division_writes_the_bytes_of_separate_files(tmp_path, tree, documents, gpt2):
    pairs = run(tree, tmp_path / "whole", gpt2)
    assert [pair.name for pair in pairs] == sorted(SLIMPAJAMA.values())
    expected = files_of(tmp_path / "whole")
    for of in (2, 3):
        prefix = tmp_path / f"of{of}"
        for index in reversed(range(of)):
            assert run(tree, prefix, gpt2, index=index, of=of, workers=2) == []
        merge_parts(prefix)
        assert files_of(prefix) == expected
        assert not (tmp_path / f"of{of}.parts").exists()
    for name, texts in by_domain(documents).items():
        alone = str(tmp_path / f"{name}-alone")
        preprocess(["x"], alone, gpt2, documents=texts)
        for suffix in (".bin", ".idx"):
            assert Path(alone + suffix).read_bytes() == expected[name + suffix]
        data = verify_data(str(tmp_path / "whole" / name))
        assert data.documents == len(texts) and data.document_tokens["max"] > 10
    words = [w for name in SLIMPAJAMA.values() for w in ("1", str(tmp_path / "whole" / name))]
    assert len(open_data(DataOptions(data_path=tuple(words))).domains) == 7


def test_without_a_split_key(tmp_path, tree, documents, gpt2):
    pattern = str(tree / "**" / "*.zst")
    for index in range(2):
        preprocess_in_parts([pattern], str(tmp_path / "a"), gpt2, index=index, of=2)
    merge_parts(tmp_path / "a")
    preprocess(expand_inputs([pattern]), str(tmp_path / "b"), gpt2)
    for suffix in (".bin", ".idx", ".tokenizer/vocab.json"):
        assert (tmp_path / f"a{suffix}").exists() == (tmp_path / f"b{suffix}").exists()
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    assert verify_data(str(tmp_path / "a")).documents == len(documents)


KILLS = [3, pytest.param(20, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_and_resumed(tmp_path, tree, kills, monkeypatch):
    """Killed at a random moment of the work, time after time; what was done stays done."""
    run(tree, tmp_path / "whole", ByteTokenizer())
    rng = np.random.default_rng(kills)
    for attempt in range(kills):
        pid = os.fork()
        if pid == 0:
            try:
                run(tree, tmp_path / "killed", SlowTokenizer(), workers=1 + attempt % 2)
            finally:
                os._exit(0)
        time.sleep(float(rng.uniform(0.02, 0.15)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not (tmp_path / "killed").exists() or (tmp_path / "killed.parts").exists():
        done = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed.parts").glob("*.json")}
        monkeypatch.setattr("megatron_eslm.data.parts.preprocess.merge_parts", lambda *a, **b: [])
        run(tree, tmp_path / "killed", ByteTokenizer())
        assert all(path.stat().st_mtime_ns == when for path, when in done.items())
        merge_parts(tmp_path / "killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_bad_input_names_file_and_remedy(tmp_path, tree):
    def refused(match: str, lines: list[object], **options) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ConfigError, match=match):
            run(path, tmp_path / "out", ByteTokenizer(), **options)
        for left in (tmp_path / "out.parts").glob("*"):
            left.is_file() and left.unlink()

    good = {"text": "a", "meta": {"redpajama_set_name": "RedPajamaC4"}}
    refused(r"bad\.jsonl, line 2 has no field 'meta\.redpajama_set_name'", [good, {"text": "b"}])
    refused(r"holds 3\.0, not a name", [{"text": "a", "meta": {"redpajama_set_name": 3}}])
    refused("cannot be the name of a file.*--domain-names", [
        {"text": "a", "meta": {"redpajama_set_name": "../x"}}
    ])  # fmt: skip
    names = tmp_path / "names.yaml"
    names.write_text("RedPajamaC5: c5\n")
    refused("'RedPajamaC4' is not in --domain-names .* Did you mean RedPajamaC5", [good],
            domain_names_file=str(names))  # fmt: skip
    names.write_text("RedPajamaC4: a/b\n")
    refused(r"'a/b' \(line 1\) names files", [good], domain_names_file=str(names))
    with pytest.raises(ConfigError, match="matches no file"):
        expand_inputs([str(tmp_path / "no*such")])
    with pytest.raises(ConfigError, match="twice"):
        preprocess_in_parts([str(tree), str(tree / "*" / "0.*")], "out", ByteTokenizer(), of=1)


def test_parts_that_are_missing_damaged_or_of_another_plan(tmp_path, tree):
    prefix, folder = tmp_path / "out", tmp_path / "out.parts"
    with pytest.raises(ConfigError, match="There are no parts"):
        merge_parts(prefix)
    run(tree, prefix, ByteTokenizer(), index=0, of=2)
    with pytest.raises(ConfigError, match=r"3 of 6 inputs are not done: .*1\.jsonl\.zst"):
        merge_parts(prefix)
    with pytest.raises(ConfigError, match=r"begun with other --append-eod \(True there, False now"):
        run(tree, prefix, ByteTokenizer(), index=1, of=2, append_eod=False)
    run(tree, prefix, ByteTokenizer(), index=1, of=2)
    ids = bytearray((folder / "2.ids").read_bytes())
    ids[5] ^= 1
    (folder / "2.ids").write_bytes(ids)
    with pytest.raises(ConfigError, match=r"2\.jsonl\.zst is damaged.*Remove .*2\.json"):
        merge_parts(prefix)
    assert not prefix.exists()
    (folder / "2.json").unlink()
    assert len(run(tree, prefix, ByteTokenizer())) == 7
    with pytest.raises(ConfigError, match="already exists"):
        run(tree, prefix, ByteTokenizer())


def test_a_merge_killed_while_it_publishes_goes_on(tmp_path, tree, monkeypatch):
    run(tree, tmp_path / "whole", ByteTokenizer())
    replace, count = os.replace, itertools.count()

    def dying(a, b):
        if next(count) == 9:
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr("megatron_eslm.data.publish.os.replace", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tree, tmp_path / "out", ByteTokenizer())
    run(tree, tmp_path / "out", ByteTokenizer())
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("several", [False, True])
def test_index_is_that_of_megatron_core(tmp_path, several):
    """Also of documents that are several sequences."""
    rng = np.random.default_rng(0)
    builder = indexed_dataset().IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for _ in range(50):
        lengths = rng.integers(1, 9, 3 if several else 1).tolist()
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "a.idx"))
    index = read_index(str(tmp_path / "a"))
    write_index(tmp_path / "b", np.uint16, index.lengths, index.starts() if several else None)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a.idx").read_bytes()
    # And so merged pairs are: those of Megatron-LM have no metadata.
    merge_pairs([str(tmp_path / "a"), str(tmp_path / "a")], tmp_path / "twice")
    twice = read_index(str(tmp_path / "twice"))
    assert twice.documents == 100 and twice.tokens == 2 * index.tokens
    assert sorted(p.name for p in tmp_path.glob("twice*")) == ["twice.bin", "twice.idx"]


def test_merged_pairs_are_those_of_all_documents(tmp_path, documents, gpt2):
    names = [str(tmp_path / name) for name in ("a", "b", "all", "merged")]
    for name, texts in zip(names, (documents[:50], documents[50:], documents), strict=False):
        preprocess(["x"], name, gpt2, documents=texts)
    merge_pairs(names[:2], Path(names[3]))
    for suffix in (".bin", ".idx"):
        assert Path(names[3] + suffix).read_bytes() == Path(names[2] + suffix).read_bytes()
    assert verify_data(names[3]).documents == len(documents)
    preprocess(["x"], str(tmp_path / "other"), ByteTokenizer(), documents=make_documents(3))
    with pytest.raises(ConfigError, match="different tokenizers"):
        merge_pairs([names[0], str(tmp_path / "other")], tmp_path / "new")
    Path(names[1] + ".bin").write_bytes(bytes(Path(names[1] + ".bin").stat().st_size))
    with pytest.raises(ConfigError, match=r"b\.bin is damaged"):
        merge_pairs(names[:2], tmp_path / "new")
    assert not (tmp_path / "new.idx").exists()


def test_ranks_of_mpi_are_shares(tmp_path, tree, monkeypatch):
    ended = []
    prefix = tmp_path / "out"
    words = ["--input", str(tree), "--output-prefix", str(prefix), "--split-key", KEY]
    for rank in (0, 1):
        world = SimpleNamespace(Get_rank=lambda rank=rank: rank, Get_size=lambda: 2)
        mpi = SimpleNamespace(COMM_WORLD=world, Finalize=lambda: ended.append(1))
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
        assert main(["preprocess", *words, "--tokenizer-type", "ByteTokenizer", "--mpi"]) == 0
        done = {int(path.stem) for path in Path(f"{prefix}.parts").glob("[0-9]*.json")}
        assert {n % 2 for n in done} == set(range(rank + 1))
    assert len(ended) == 2


def test_commands(tmp_path, tree, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    (tmp_path / "list.txt").write_text(f"# all\n{tree}/*/*.zst\n")

    def run_command(name: str, *words: str) -> str:
        assert main([name, *words]) == 0
        return capsys.readouterr().out

    prefix = str(tmp_path / "out")
    run_command(
        "preprocess", "--input", f"@{tmp_path / 'list.txt'}", "--output-prefix", prefix,
        "--split-key", KEY, "--index", "0", "--of", "1", "--append-eod", "--workers", "2",
        "--tokenizer-type", "ByteTokenizer",
    )  # fmt: skip
    assert f"{prefix}/c4" in run_command("merge-data", "--output-prefix", prefix)
    assert run_command("verify-data", prefix).count("tokens of a document: min ") == 7
    for words, said in (
        (["--index", "2", "--of", "2"], "the index runs from 0 to --of - 1"),
        (["--index", "1"], "--index and --of belong together"),
        (["--index", "0", "--of", "2", "--mpi"], "--mpi sets --index and --of itself"),
        (["--mpi"], "--mpi needs mpi4py"),
        (["--domain-names", "x"], "--domain-names has no meaning without --split-key"),
    ):
        command = ["preprocess", "--input", "x", "--output-prefix", prefix]
        assert main([*command, "--tokenizer-type", "ByteTokenizer", *words]) == 2
        assert said in capsys.readouterr().err
