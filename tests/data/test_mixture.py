"""The order of sequences: proportions, independence of ranks, resume, epochs, validation."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.mixture import Datasets, build_datasets
from megatron_eslm.data.options import DataOptions
from megatron_eslm.data.plan import check_epochs, plan_mixture
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.source import open_data
from megatron_eslm.data.tokenizers import ByteTokenizer
from megatron_eslm.errors import ConfigError

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


def test_eod_mask(domains):
    item = None
    data = build([domains[0]], eod_mask_loss=True)
    for i in range(len(data.train)):
        item = data.train[i]
        assert torch.equal(item["valid"], item["tokens"][:-1] != 256)
    assert any(not data.train[i]["valid"].all() for i in range(len(data.train)))


def test_plan_equals_build_and_writes_nothing(two, tmp_path):
    options = DataOptions(data_path=tuple(two), split="80,20")
    plan = plan_mixture(open_data(options), options, T, 100, 8)
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


def test_cache_that_cannot_be_used(two, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-cache-path"):
        build(two, data_cache_path=str(tmp_path / "file"))
    build(two)
    for path in (tmp_path / "cache").glob("alpha-train-*/*shuffle_index.npy"):
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ConfigError, match=r"is damaged .*Delete it"):
        build(two)


# --- several processes


def _rank(rank: int, world: int, store: str, words: list[str], out: str, cache: str | None) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        data = build(words, data_cache_path=cache)
        torch.save((rows(data.train), rows(data.valid)), f"{out}{rank}")
    except ConfigError as error:
        torch.save(str(error), f"{out}{rank}")
    finally:
        dist.destroy_process_group()


def _run_ranks(tmp_path: Path, words: list[str], cache: str | None) -> list:
    import torch.multiprocessing as mp

    name = f"{len(list(tmp_path.iterdir()))}"
    mp.start_processes(
        _rank,
        args=(2, str(tmp_path / f"store{name}"), words, str(tmp_path / f"out{name}-"), cache),
        nprocs=2,
        start_method="fork",
    )
    return [torch.load(tmp_path / f"out{name}-{r}") for r in range(2)]


@pytest.mark.timeout(120)
def test_two_ranks(two, tmp_path):
    first, second = _run_ranks(tmp_path, two, None)
    assert first == second
    alone = build(two, data_cache_path=str(tmp_path / "alone"))
    assert first == (rows(alone.train), rows(alone.valid))


@pytest.mark.timeout(120)
def test_error_of_rank_zero_stops_all(two, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = _run_ranks(tmp_path, two, str(tmp_path / "file"))
    assert "--data-cache-path" in first
    assert first == second


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
