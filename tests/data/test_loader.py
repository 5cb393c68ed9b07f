"""Batches of the loader: order, resume, processes that load and how they end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.loader import build_loader
from megatron_eslm.data.loader_processes import LoaderError
from megatron_eslm.data.mixture import Datasets, build_datasets
from megatron_eslm.data.skipped_samples import SkippedSamples
from megatron_eslm.data.source import open_data
from megatron_eslm.errors import ConfigError

T = 32


@pytest.fixture
def data(two) -> Datasets:
    options = DataOptions(data_path=tuple(two), split="80,20")
    return build_datasets(
        open_data(options),
        options,
        seq_length=T,
        train_samples=100,
        valid_samples=8,
        seed=1,
        aligns=False,
    )


def load(data, *, start=0, num=48, m=4, dp=1, workers=0, skipped=()):
    """Per global micro-batch, the rows of all ranks in order."""
    loaders = [
        build_loader(
            data.train,
            start_sample=start,
            num_samples=num,
            micro_batch_size=m,
            dp_rank=r,
            dp_size=dp,
            num_workers=workers,
            skipped=SkippedSamples(skipped),
        )
        for r in range(dp)
    ]
    if dp == 1:
        return list(loaders[0])
    return [
        {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*loaders, strict=True)
    ]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[key], y[key])
        for x, y in zip(a, b, strict=True)
        for key in ("tokens", "valid", "samples")
    )


def test_order_does_not_depend_on_ranks_or_workers(data):
    expected = load(data, m=8)
    assert expected[0]["tokens"].shape == (8, T + 1)
    assert torch.cat([b["samples"] for b in expected]).tolist() == list(range(48))
    for i in (0, 11, 47):
        assert torch.equal(expected[i // 8]["tokens"][i % 8], data.train[i]["tokens"])
    for m, dp, workers in ((4, 2, 0), (2, 4, 0), (1, 8, 0), (8, 1, 2), (4, 2, 1)):
        assert same(load(data, m=m, dp=dp, workers=workers), expected)


def test_workers_need_no_shared_memory(data):
    """Containers have little of it; and a worker would complain of a rank that was killed."""
    (first, *_) = load(data, m=48, workers=1)
    assert not any(tensor.is_shared() for tensor in first.values())
    assert {key: tensor.dtype for key, tensor in first.items()} == {
        "tokens": torch.int64,
        "valid": torch.bool,
        "samples": torch.int64,
    }


def test_resume(data):
    straight = load(data, m=2, dp=2)
    assert same(load(data, start=20, num=28, m=2, dp=2), straight[5:])


def test_skipped_samples_are_jumped_over(data):
    """Whatever the ranks, and wherever in a micro-batch they lie."""
    skipped = ((0, 3), (10, 12), (17, 30), (32, 33))
    expected = load(data, m=8, num=32, skipped=skipped)
    numbers = torch.cat([batch["samples"] for batch in expected]).tolist()
    assert numbers == [*range(3, 10), *range(12, 17), 30, 31, *range(33, 51)]
    assert torch.equal(expected[1]["tokens"][6], data.train[33]["tokens"])
    for m, dp, workers in ((4, 2, 0), (1, 8, 0), (2, 4, 1)):
        assert same(load(data, m=m, dp=dp, num=32, workers=workers, skipped=skipped), expected)
    # From any position on, also from the edge of a range and with another micro-batch.
    rest = load(data, start=17, m=5, num=20, skipped=skipped)
    assert torch.cat([batch["samples"] for batch in rest]).tolist() == numbers[12:]
    with pytest.raises(ValueError, match="samples 0 to 101 of 100"):
        load(data, num=80, skipped=((50, 71),))


def test_loading_leaves_the_random_state_alone(data):
    before = torch.get_rng_state()
    load(data, workers=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_range_is_checked_at_once(data):
    for arguments in ({"num": 50}, {"start": 60}, {"start": -4}):
        with pytest.raises(ValueError, match="samples"):
            load(data, **arguments)


class Broken(torch.utils.data.Dataset):
    def __init__(self, mixture, how):
        self.mixture, self.how, self.source = mixture, how, mixture.source

    def __len__(self):
        return len(self.mixture)

    def __getitem__(self, i):
        item = self.mixture[i]
        if i == 13:
            if self.how == "raise":
                raise OSError("the disk is gone")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            item["tokens"][5] = 257
        return item


@pytest.mark.parametrize(
    ("how", "workers", "error", "message"),
    [
        ("raise", 0, OSError, "the disk is gone"),
        ("raise", 2, OSError, "the disk is gone"),
        (
            "die",
            2,
            LoaderError,
            r"loader process 2 of 2 \(pid \d+\), which was to deliver samples 12 to 15, was "
            r"killed by SIGKILL\. Most likely .* out of memory; --num-workers 0 .* with --load",
        ),
        ("id", 2, ConfigError, r"Sample 13, from .*(alpha|beta), .* of 257 \(257\)"),
    ],
)
@pytest.mark.timeout(60)
def test_failures_surface(data, how, workers, error, message):
    broken = Datasets(Broken(data.train, how), None, data.report)
    with pytest.raises(error, match=message):
        load(broken, workers=workers)


class Endless(torch.utils.data.Dataset):
    """Batches of 200 kB, more than a pipe holds."""

    def __init__(self, mixture):
        self.source = mixture.source

    def __len__(self):
        return 10**6

    def __getitem__(self, i):
        tokens = torch.zeros(6001, dtype=torch.int64)
        return {"tokens": tokens, "valid": tokens[1:] == 0}


def load_without_end(data, write, busy):
    try:
        batches = build_loader(
            data,
            start_sample=0,
            num_samples=10**6,
            micro_batch_size=4,
            dp_rank=0,
            dp_size=1,
            num_workers=2,
        )
        next(batches)
        os.write(write, b".")
        while busy:
            next(batches)
        time.sleep(1000)
    finally:
        os._exit(1)  # Whatever happens, it is not to go on with the tests.


@pytest.mark.timeout(60)
@pytest.mark.parametrize("busy", [True, False])
def test_workers_of_a_killed_process_end_without_a_word(data, busy, capfd):
    """In the middle of handing over, or with all they can prefetch in hand."""
    endless = Endless(data.train)
    for attempt in range(8 if busy else 1):
        read, write = os.pipe()
        process = os.fork()
        if process == 0:  # It and its workers hold the pipe open.
            os.close(read)
            load_without_end(endless, write, busy)
        os.close(write)
        assert os.read(read, 1) == b"."
        time.sleep(0.1 + 0.017 * attempt if busy else 0.5)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert os.read(read, 1) == b""
        os.close(read)
    assert capfd.readouterr().err == ""
