"""The order of sequences: proportions, independence of ranks, resume, epochs, validation."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eslm.data import shared_folder
from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.mixture import Datasets, build_datasets
from megatron_eslm.data.plan import check_epochs, check_skipped, plan_mixture
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.skipped_samples import SkippedSamples
from megatron_eslm.data.source import open_data
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.built_once import RECORD, _seal
from tests.harness import run_ranks

T = 32


def build(
    words, train=100, valid=8, split="80,20", seed=1, seq_length=T, aligns=False, **more
) -> Datasets:
    options = DataOptions(data_path=tuple(words), split=split, **more)
    return build_datasets(
        open_data(options),
        options,
        seq_length=seq_length,
        train_samples=train,
        valid_samples=valid,
        seed=seed,
        aligns=aligns,
    )


def rows(dataset) -> list[tuple[int, ...]]:
    return [tuple(dataset[i]["tokens"].tolist()) for i in range(len(dataset))]


def test_item_and_proportions(two):
    data = build(two, train=100)
    item = data.train[0]
    assert item["tokens"].shape == (T + 1,)
    assert item["tokens"].dtype == torch.int64
    assert item["valid"].shape == (T,)
    assert item["valid"].dtype == torch.bool
    assert item["valid"].all()
    counts = Counter(data.train[i]["domain"] for i in range(100))
    assert counts == {0: 75, 1: 25}
    for n in (8, 20, 40):  # and throughout, not only at the end
        assert abs(sum(data.train[i]["domain"] == 1 for i in range(n)) - n / 4) <= 1
    with pytest.raises(IndexError):
        data.train[100]


def test_samples_are_the_text_of_their_domain_and_split(two, domains):
    data = build(two, train=120, valid=20)
    for dataset, split in ((data.train, "train"), (data.valid, "valid")):
        for i in range(len(dataset)):
            item = dataset[i]
            index = read_index(domains[item["domain"]])
            documents = np.split(index.ids(), np.cumsum(index.lengths)[:-1])
            cut = round(0.8 * len(documents))
            part = documents[:cut] if split == "train" else documents[cut:]
            text = b"".join(bytes(d[:-1].astype(np.uint8)) + b"\0" for d in part)
            ids = item["tokens"].tolist()
            for piece in bytes([0 if t == 256 else t for t in ids]).split(b"\0"):
                assert piece in text


def test_every_sequence_of_an_epoch_once(domains):
    data = build([domains[0]], train=1)
    n = data.report.domains[0].sequences["train"]
    data = build([domains[0]], train=n)
    assert len(set(rows(data.train))) == n
    assert data.report.domains[0].epochs == 1


def test_longer_run_begins_like_a_shorter_one(two):
    """Within one epoch the order does not depend on the length of the run."""
    long = build(two, train=110)
    assert max(d.epochs for d in long.report.domains) <= 1
    for n in (1, 7, 50):
        short = build(two, train=n)
        assert rows(short.train) == rows(long.train)[:n]
        assert rows(short.valid) == rows(long.valid)


def test_order_depends_on_seed_and_is_cached(two, tmp_path, monkeypatch):
    first = rows(build(two).train)
    assert (tmp_path / "cache").is_dir()
    from megatron.core.datasets import gpt_dataset

    with monkeypatch.context() as patch:
        patch.setattr(gpt_dataset, "_build_shuffle_index", None)  # a second build reads the cache
        assert rows(build(two).train) == first
    assert rows(build(two, seed=2).train) != first
    # Runs of several seeds are measured by the same text.
    assert rows(build(two, seed=2).valid) == rows(build(two).valid)
    elsewhere = tmp_path / "elsewhere"
    assert rows(build(two, data_cache_path=str(elsewhere)).train) == first
    assert elsewhere.is_dir()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0.1, 0.2, 0.7), (0.3, 0.6, 2.1)),
        ((0.1, 0.2, 0.7), (1, 2, 7)),
        ((0.7, 0.2, 0.1), (7, 2, 1)),
        ((0.526, 0.267, 0.207), (526, 267, 207)),
    ],
)
def test_equal_weights_and_splits_give_one_order(tmp_path, domains, documents, one, other):
    """To the last sample and from one cache; as floats they differ in their last digits."""
    prefixes = [*domains, str(tmp_path / "gamma")]
    preprocess(["x"], prefixes[2], ByteTokenizer(), documents=documents)
    both = [
        build([w for pair in zip(map(str, ws), prefixes, strict=True) for w in pair],
              train=20_000, split=split)
        for ws, split in ((one, "0.8,0.2"), (other, "80,20,0"))
    ]  # fmt: skip
    first, second = (data.train for data in both)
    np.testing.assert_array_equal(first._domain_of, second._domain_of)
    np.testing.assert_array_equal(first._index_in_domain, second._index_in_domain)
    assert both[0].report == both[1].report
    # One blend and three domains, for training and for validation.
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_new_contents_under_an_old_name_miss_the_cache(tmp_path, domains):
    texts = [f"{n} entirely other words {n * n}" for n in range(150)]

    before = rows(build([domains[0]]).train)
    preprocess(["x"], domains[0], ByteTokenizer(), documents=texts, overwrite=True)
    after = rows(build([domains[0]]).train)
    assert set(before).isdisjoint(after)


def test_several_epochs(two):
    data = build(two, train=4000)
    repeated = Counter(rows(data.train))
    assert len(data.train) == 4000
    assert max(repeated.values()) > 1
    epochs = {d.name: d.epochs for d in data.report.domains}
    assert all(e > 2 for e in epochs.values())
    with pytest.raises(
        ConfigError, match=r"times .*--max-epochs 1 allows.* lower --train-iters"
    ) as caught:
        check_epochs(data.report, 1.0)
    most = max(data.report.domains, key=lambda d: d.epochs)
    assert most.prefix in str(caught.value)
    assert f"{most.epochs:.2f}" in str(caught.value)
    check_epochs(data.report, most.epochs)


def test_validation_never_repeats_and_keeps_the_weights(two):
    data = build(two, train=10, valid=100_000)
    assert data.valid is not None
    assert 0 < len(data.valid) == data.report.valid_samples < 100_000
    assert len(set(rows(data.valid))) == len(data.valid)
    counts = Counter(data.valid[i]["domain"] for i in range(len(data.valid)))
    assert abs(counts[1] - len(data.valid) / 4) <= 1
    for domain in data.report.domains:
        assert domain.samples_needed["valid"] <= domain.sequences["valid"]
    # One more would need a second epoch of the domain that limits it.
    limits = [d.sequences["valid"] / d.weight for d in data.report.domains]
    assert abs(len(data.valid) - min(limits)) <= 1 / min(d.weight for d in data.report.domains)
    assert build(two, valid=3).report.valid_samples == 3
    assert build(two, valid=0).valid is None


@pytest.mark.parametrize("domains_read", [1, 2])
def test_what_alignment_reads_is_the_rest_of_the_validation_split(two, domains, domains_read):
    words = two if domains_read == 2 else [domains[0]]
    plain, everything = build(words), build(words, valid=100_000)
    assert plain.alignment is None and plain.report.alignment_samples == 0
    both = build(words, aligns=True)
    assert rows(both.train) == rows(plain.train) and rows(both.valid) == rows(plain.valid)
    assert rows(both.valid) + rows(both.alignment) == rows(everything.valid)
    assert len(both.alignment) == both.report.alignment_samples > 8
    for part in (both.valid, both.alignment):
        assert [part.domain_of(i) for i in range(len(part))] == [
            part[i]["domain"] for i in range(len(part))
        ]
        with pytest.raises(IndexError):
            part[len(part)]
    for domain in both.report.domains:
        assert domain.samples_needed["valid"] <= domain.sequences["valid"]
    # Whatever seed training has; all of it where nothing is evaluated.
    assert rows(build(words, seed=2, aligns=True).alignment) == rows(both.alignment)
    unevaluated = build(words, valid=0, aligns=True)
    assert unevaluated.valid is None and rows(unevaluated.alignment) == rows(everything.valid)
    # Half of it where evaluation would leave fewer than are wanted at least.
    reach = len(everything.valid)
    for wanted, least, evaluated in (
        (100_000, 1, reach // 2),
        (reach, reach - reach // 2, reach // 2),
        (reach - 4, 4, reach - 4),
        (reach - 3, 4, reach // 2),
        (100_000, reach, reach // 2),  # too few in any case; training refuses it
    ):
        found = build(words, valid=wanted, aligns=least)
        assert rows(found.valid) == rows(everything.valid)[:evaluated], (wanted, least)
        assert rows(found.valid) + rows(found.alignment) == rows(everything.valid)
    with pytest.raises(ConfigError, match=r"validation split has 0 tokens .*or add data\.$"):
        build(words, split="1,0", valid=0, aligns=True)


@pytest.mark.parametrize("weight", [0.05, 1 / 3, 0.5, 0.9])
def test_bound_on_the_samples_of_a_domain(weight):
    """plan.py's bound against megatron-core's own blending."""
    from megatron.core.datasets import helpers

    from megatron_eslm.data.plan import _samples_at_most, _samples_within

    weights = [weight, (1 - weight) * 0.3, (1 - weight) * 0.7]
    for n in (1, 2, 3, 7, 10, 101, 1000):
        which, index = np.zeros(n, np.int16), np.zeros(n, np.int64)
        helpers.build_blending_indices(which, index, weights, 3, n, False)
        for d, w in enumerate(weights):
            count = int((which == d).sum())
            assert count <= _samples_at_most(n, w) <= count + 2
            assert _samples_at_most(_samples_within(n, w), w) <= n


def test_skipped_samples_end_where_the_data_do(two):
    report = build(two, train=100).report
    sequences = [d.sequences["train"] for d in report.domains]
    last = min(4 * sequences[0] / 3, 4 * sequences[1])
    for max_epochs in (1.0, 2.5):
        end = int(last * max_epochs)
        check_skipped(report, max_epochs, SkippedSamples(((3, 5), (7, end - 3))))
        with pytest.raises(ConfigError, match=rf"--skip-samples 7:{end + 5} reaches beyond the "):
            check_skipped(report, max_epochs, SkippedSamples(((3, 5), (7, end + 5))))


def test_eod_mask(domains):
    item = None
    data = build([domains[0]], eod_mask_loss=True)
    for i in range(len(data.train)):
        item = data.train[i]
        assert torch.equal(item["valid"], item["tokens"][:-1] != 256)
    assert any(not data.train[i]["valid"].all() for i in range(len(data.train)))


def test_plan_equals_build_and_writes_nothing(two, tmp_path):
    options = DataOptions(data_path=tuple(two), split="80,20")
    plan = plan_mixture(open_data(options), T, 100, 8)
    assert not (tmp_path / "cache").exists()
    assert plan == build(two).report
    alpha = plan.domains[0]
    assert alpha.documents == {"train": 120, "valid": 30, "test": 0}
    assert sum(alpha.tokens.values()) == open_data(options).domains[0].tokens


def test_split_too_small(two, domains):
    with pytest.raises(
        ConfigError, match=r"alpha: the validation split has 0 tokens in 0 of 150 .*--split 1,0"
    ):
        build(two, split="1,0")
    assert build(two, split="1,0", valid=0).valid is None
    with pytest.raises(ConfigError, match=r"training split has .*--seq-length 90000 needs 90001"):
        build(two, seq_length=90000)
    with pytest.raises(ConfigError, match=r"beta: the validation .*--eval-iters 0"):
        build(["1", domains[0], "1", domains[1]], split="999,4")
    with pytest.raises(ConfigError, match="Nothing to train on"):
        build(two, train=0)


# --- the index cache


def test_cache_that_cannot_be_written(two, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"index cache .*file/alpha.* --data-cache-path"):
        build(two, data_cache_path=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"--data-cache-path .* has a NUL"):
        build(two, data_cache_path="a\0b")


@pytest.mark.parametrize("limit", [700, 2000, 5000])
def test_a_full_disk_leaves_no_cache(two, tmp_path, limit):
    """NumPy writes what there is room for and says nothing."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ConfigError, match=r"index cache .* cannot be written.*--data-cache"):
            build(two, data_cache_path=str(tmp_path / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert rows(build(two, data_cache_path=str(tmp_path / "cache")).train) == rows(build(two).train)


def _behind_the_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:128] + bytes(len(data) - 128))


def _an_object(path: Path) -> None:
    np.save(path, np.array([_Print()], dtype=object))


class _Print:
    """What unpickling this would show."""

    def __reduce__(self):
        return print, ("executed",)


def test_a_damaged_cache_is_built_again(two, tmp_path, caplog):
    """Among them one that reads as the same sequence again and again."""
    expected = rows(build(two).train)
    caches = sorted((tmp_path / "cache").iterdir())
    assert [cache.name.rpartition("-")[0] for cache in caches] == [
        "alpha-train", "alpha-valid", "beta-train", "beta-valid", "blend-train", "blend-valid",
    ]  # fmt: skip
    shuffle = next(caches[0].glob("*shuffle_index.npy"))
    for damage in (
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        _behind_the_header,
        lambda path: path.write_bytes(path.read_bytes()[:-50]),
        lambda path: path.unlink(),
        _an_object,
    ):
        for path in (shuffle, caches[4] / "index.npy"):
            damage(path)
            caplog.clear()
            with caplog.at_level("INFO", logger="megatron_eslm"):
                assert rows(build(two).train) == expected
            (line,) = caplog.messages
            assert path.name in line and "building it again" in line


def test_a_cache_that_would_run_code_is_refused(two, tmp_path, capfd):
    """Whatever its record says: a record can be written, too."""
    build(two)
    cache = next((tmp_path / "cache").glob("blend-train-*"))
    _an_object(cache / "domain.npy")
    (cache / RECORD).unlink()
    _seal(cache, "")
    with pytest.raises(ConfigError, match=r"blend-train-.* is damaged"):
        build(two)
    assert "executed" not in capfd.readouterr().out


def test_domains_of_one_name_share_the_cache_folder(tmp_path, domains):
    (tmp_path / "b").mkdir()
    other = str(tmp_path / "b" / "alpha")
    preprocess(["x"], other, ByteTokenizer(), documents=[f"{n} " * 20 for n in range(90)])
    build(["1", domains[0], "1", other], data_cache_path=str(tmp_path / "cache"))
    assert len([p for p in os.listdir(tmp_path / "cache") if p.startswith("alpha-train-")]) == 2
    assert len(os.listdir(tmp_path / "b")) == 4


def test_jobs_that_share_a_cache_start_at_once(two, tmp_path):
    """Each builds or finds what another has built; all read the same."""
    expected = rows(build(two, data_cache_path=str(tmp_path / "alone")).train)
    fork = multiprocessing.get_context("fork")
    for cache in ("a", "b", "c"):
        start, results = fork.Barrier(4), fork.Queue()

        def job(cache=cache, start=start, results=results) -> None:
            start.wait()
            try:
                results.put(rows(build(two, data_cache_path=str(tmp_path / cache)).train))
            except BaseException as error:
                results.put(repr(error))

        jobs = [fork.Process(target=job) for _ in range(4)]
        for process in jobs:
            process.start()
        for _ in jobs:
            assert results.get(timeout=60) == expected
        for process in jobs:
            process.join()
        assert len(os.listdir(tmp_path / cache)) == 6


# --- several processes


def test_ranks_share_the_cache(two, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "WAIT_SECONDS", 0.5)

    def attempt(cache: str):
        try:
            data = build(two, data_cache_path=str(tmp_path / cache))
        except ConfigError as error:
            return str(error)
        return rows(data.train), rows(data.valid)

    def on_rank(rank: int):
        (tmp_path / "file").touch()
        read = [attempt("shared")]
        os.environ["LOCAL_RANK"] = "0"  # of another machine
        read.append(attempt("shared"))
        return read, attempt("file"), attempt(f"of rank {rank}")

    first, second = run_ranks(2, on_rank)
    alone = build(two, data_cache_path=str(tmp_path / "alone"))
    assert first == second  # errors, too
    assert first[0] == [(rows(alone.train), rows(alone.valid))] * 2
    assert "--data-cache-path" in first[1]
    for part in ("of rank 1/alpha-train-", "is not there", "All machines must share", "rank 1)"):
        assert part in first[2]


def test_documents_may_span_sequences(tmp_path):
    """Packing: consecutive sequences share one id, nothing else is lost but the last remainder."""
    text = "".join(chr(33 + i % 90) for i in range(1000))
    preprocess(["x"], str(tmp_path / "long"), ByteTokenizer(), documents=[text] * 2)
    data = build([str(tmp_path / "long")], train=31, valid=0, split="1")
    n = data.report.domains[0].sequences["train"]
    data = build([str(tmp_path / "long")], train=n, valid=0, split="1")
    stream = [*text.encode(), 256] * 2
    expected = {tuple(stream[i * T : i * T + T + 1]) for i in range(n)}
    assert set(itertools.islice(rows(data.train), n)) == expected
