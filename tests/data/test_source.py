"""Every way in which --data-path, its files and the tokenizer flags can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_eslm.data import index_file, source
from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.plan import document_ranges
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.source import (
    canonical_data_path,
    canonical_split,
    open_data,
    parse_data_path,
    parse_split,
)
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError
from tests.harness import run_ranks


def opened(*words: str, **options):
    return open_data(DataOptions(data_path=words, **options))


def test_domains_and_weights(domains):
    source = opened("3", domains[0], "1", domains[1])
    assert [d.name for d in source.domains] == ["alpha", "beta"]
    assert [d.weight for d in source.domains] == [0.75, 0.25]
    assert [d.documents for d in source.domains] == [150, 90]
    assert source.tokenizer.name == "ByteTokenizer"
    assert source.weights == (3, 1)
    single = opened(domains[0])
    assert single.domains[0].weight == 1


def test_fingerprint_follows_contents(tmp_path, domains, documents):
    first = opened(domains[0]).fingerprint
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("alpha.*"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / "moved" / path.name)
    assert opened(str(tmp_path / "moved" / "alpha")).fingerprint == first
    assert opened(domains[1]).fingerprint != first
    changed = [*documents[:-1], documents[-1][:-1] + "#"]  # one byte, same sizes
    fingerprints = set()
    for n, texts in enumerate((documents, changed)):
        prefix = str(tmp_path / f"d{n}")
        preprocess(["x"], prefix, ByteTokenizer(), documents=texts)
        fingerprints.add(opened(prefix).fingerprint)
        os.unlink(f"{prefix}.meta.json")
        fingerprints.add(opened(prefix, tokenizer_type="ByteTokenizer").fingerprint)
    assert len(fingerprints) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "is empty"),
        (("1", "a", "2"), "has 3 words .*a weight before every prefix"),
        (("a", "b"), "'a' before b .*not a number"),
        (("0", "a", "1", "b"), "weight 0 of a must be positive"),
        (("-1", "a", "1", "b"), "weight -1 of a must be positive"),
        (("nan", "a", "1", "b"), "weight nan of a must be positive"),
        (("1", "x/a", "1", "x/../x/a"), "names x/../x/a twice"),
    ],
)
def test_data_path_words(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_data_path(words)


EQUAL_WEIGHTS = [
    (["0.1", "0.9"], ["1", "9"], (1, 9)),
    (["0.3", "2.7"], [" 1_0 ", "9e1"], (1, 9)),
    (["0.333333333333333", "0.666666666666666"], ["1e-9", "2e-9"], (1, 2)),
    (["1e-300", "1e-300"], ["1e300", "1e300"], (1, 1)),
]


@pytest.mark.parametrize(("one", "other", "weights"), EQUAL_WEIGHTS)
def test_equal_weights_are_equal_however_they_are_typed(domains, one, other, weights):
    forms = [[one[0], domains[0], one[1], domains[1]], [other[0], domains[0], other[1], domains[1]]]
    sources = [opened(*form) for form in forms]
    assert sources[0].domains == sources[1].domains
    assert sources[0].weights == sources[1].weights == weights
    assert {canonical_data_path(form) for form in forms} == {
        f"{weights[0]} {domains[0]} {weights[1]} {domains[1]}"
    }
    assert canonical_data_path(["7", "a"]) == canonical_data_path(["a"]) == "a"


@pytest.mark.parametrize(
    "split",
    ["", "a,b", "1,2,3,4", "-1,2", "0,1", "nan,1", "98;1;1", "inf,1", "1e-400,1", "1e308,1,1"],
)
def test_bad_split(domains, split):
    with pytest.raises(ConfigError, match="--split"):
        opened(domains[0], split=split)


def test_good_split():
    assert parse_split("98,1,1") == (0.98, 0.01, 0.01)
    assert parse_split("3,1") == (0.75, 0.25, 0)
    assert parse_split("1") == (1, 0, 0)


@pytest.mark.parametrize(
    ("splits", "canonical"),
    [
        (["98,1,1", "0.98,0.01,0.01", "49,0.5,.5", "9.8e1, 1, 1"], "98,1,1"),
        (["80,18,2", "0.8,0.18,0.02", "40,9,1"], "40,9,1"),
        (["1", "1,0", "3,0,0", "0.1"], "1,0,0"),
        (["0.7,0.2,0.1", "7,2,1", "2.1,.6,.3"], "7,2,1"),
    ],
)
def test_equal_splits_are_equal_however_they_are_typed(splits, canonical):
    assert {canonical_split(split) for split in splits} == {canonical}
    for documents in (1, 5, 25, 75, 150, 1234567):
        (ranges,) = {str(document_ranges(split, documents)) for split in splits}
        assert f"'test': ({documents}, {documents})" in ranges or canonical != "1,0,0"


def test_facts_of_another_run(domains):
    shutil.copy(domains[1] + ".meta.json", domains[0] + ".meta.json")
    with pytest.raises(ConfigError, match="They are not from one run"):
        opened(domains[0])


def test_tokenizer_of_the_data(tmp_path, domains, gpt2, hf, documents, bpe_files):
    other = str(tmp_path / "other")
    preprocess(["x"], other, gpt2, documents=documents)
    with pytest.raises(
        ConfigError, match=r"alpha was made with ByteTokenizer .*other with GPT2BPETokenizer"
    ):
        opened("1", domains[0], "1", other)
    with pytest.raises(
        ConfigError, match=r"HuggingFaceTokenizer .*but .*other was made with GPT2BPETokenizer"
    ):
        opened(
            other,
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(bpe_files / "tokenizer.json"),
        )
    with pytest.raises(ConfigError, match="have no effect without --tokenizer-type"):
        opened(other, vocab_file=str(bpe_files / "vocab.json"))
    opened(domains[0], tokenizer_type="ByteTokenizer")
    shutil.rmtree(f"{other}.tokenizer")
    with pytest.raises(ConfigError, match="has no stored tokenizer"):
        opened(other)
    hf.save(f"{other}.tokenizer")
    with pytest.raises(ConfigError, match="but the data was made with GPT2BPETokenizer"):
        opened(other)


def test_too_many_domains(domains):
    with pytest.raises(ConfigError, match="mixture of 32,769 domains"):
        opened(*(word for n in range(2**15 + 1) for word in ("1", f"d{n}")))


def test_an_index_is_compared_with_its_checksum(domains):
    """A type code that only turns ids of 32768 and more negative, which this text has not."""
    idx = Path(domains[0] + ".idx")
    data = bytearray(idx.read_bytes())
    assert data[17] == 8
    data[17] = 3
    idx.write_bytes(data)
    with pytest.raises(ConfigError, match=r"alpha\.idx is damaged or from another run: its"):
        opened(domains[0])
    os.unlink(domains[0] + ".meta.json")
    opened(domains[0], tokenizer_type="ByteTokenizer")  # the ids themselves are what they were


def test_text_of_another_run_under_an_index(tmp_path, domains):
    """Of the same size, so that only the ends of documents tell."""
    for name, lengths in (("a", (9, 11, 10)), ("b", (9, 10, 11))):
        texts = ["z" * n for n in lengths for _ in range(400)]
        preprocess(["x"], str(tmp_path / name), ByteTokenizer(), documents=texts)
    assert (tmp_path / "a.bin").stat().st_size == (tmp_path / "b.bin").stat().st_size
    shutil.copy(tmp_path / "b.bin", tmp_path / "a.bin")
    # Of 1200 documents every fourth is looked at.
    with pytest.raises(ConfigError, match=r"a: document 400 does not end in the .* id 256"):
        opened(str(tmp_path / "a"))


def test_ranks_trust_what_rank_zero_has_checked(domains, monkeypatch):
    """Whole files are read once on a machine; what is wrong there is said by all ranks alike."""
    checked = []
    for name in ("check_sum", "check_ends"):
        monkeypatch.setattr(source, name, lambda *args, name=name, **_: checked.append(name))
    offsets = index_file._check_offsets
    monkeypatch.setattr(
        index_file, "_check_offsets", lambda *args: (checked.append("offsets"), offsets(*args))
    )

    def on_rank(rank: int):
        fingerprint = opened(*domains[:1]).fingerprint
        first = list(checked)
        checked.clear()
        with pytest.raises(ConfigError, match=r"is different data here than on .* \(on rank 1\)$"):
            opened(domains[rank])
        checked.clear()
        os.environ["LOCAL_RANK"] = "0"  # of another machine
        opened(*domains[:1])
        if rank == 0:
            with open(domains[0] + ".idx", "r+b") as file:
                file.seek(34 + 4 * 150 + 8 * 7)
                file.write(b"\0" * 8)
        with pytest.raises(ConfigError) as caught:
            opened(*domains[:1])
        return fingerprint, first, sorted(checked)[:3], str(caught.value)

    (fingerprint, first, second, message), other = run_ranks(2, on_rank)
    assert first == ["offsets", "check_sum", "check_ends"]
    assert other == (fingerprint, [], second, message)
    assert (
        second == ["check_ends", "check_sum", "offsets"] and "has sequence 7 at byte 0" in message
    )


def test_ids_beyond_the_vocabulary_by_the_facts(domains):
    path = Path(domains[0] + ".meta.json")
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "max_token_id": 300}))
    with pytest.raises(ConfigError, match="holds the id 300, beyond the vocabulary of 257"):
        opened(domains[0])
