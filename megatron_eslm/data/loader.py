"""Data loader of one data-parallel rank, in the order of Megatron's sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_eslm.data.loader_processes import LoaderProcesses
from megatron_eslm.data.mixture import Mixture
from megatron_eslm.data.skipped_samples import SkippedSamples
from megatron_eslm.errors import ConfigError


def build_loader(
    dataset: Mixture,
    *,
    start_sample: int,
    num_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    timeout_seconds: float = 600.0,
    pin_memory: bool = False,
    skipped: SkippedSamples | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Load this rank's share of the `num_samples` unskipped samples from `start_sample` on.

    Global micro-batch g holds samples g*M*DP to (g+1)*M*DP of these, and rank r takes rows r*M to
    (r+1)*M of it. To resume, start where the run stopped, whatever M and DP were then.

    Args:
        dataset: from `build_datasets`.
        start_sample: first sample, over all ranks.
        num_samples: samples that all ranks read; a multiple of `micro_batch_size * dp_size`.
        micro_batch_size: M.
        dp_rank: r.
        dp_size: DP.
        num_workers: loader processes; 0 loads in this process.
        timeout_seconds: how long to wait for a batch of a loader process.
        pin_memory: put batches into page-locked memory.
        skipped: samples to skip.

    Yields:
        {"tokens": int64 [M, T+1], "valid": bool [M, T], "samples": int64 [M]}, where `samples` are
        sample numbers in the run; and, if the data set has them, "labels": int64 [M, T] and
        "reference": float32 [M, T].

    Raises:
        ValueError: the range does not fit the data set or the batches; nothing is loaded then.
        ConfigError: no process can be started; (while iterating) a sample, named by its number,
            has an id outside the vocabulary.
        LoaderError: (while iterating) a process has died or delivers nothing.
    """
    rows, skipped = micro_batch_size * dp_size, skipped or SkippedSamples()
    if num_samples % rows:
        raise ValueError(f"{num_samples} samples do not divide into micro-batches of {rows}")
    stop_sample = skipped.after(start_sample, num_samples)
    if start_sample < 0 or stop_sample > len(dataset):
        raise ValueError(f"samples {start_sample} to {stop_sample} of {len(dataset)}")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"rank {dp_rank} of {dp_size}")
    batches = _RankBatches(
        start_sample, num_samples // rows, rows, dp_rank, micro_batch_size, skipped
    )

    def make(numbers: list[int]) -> dict[str, np.ndarray]:
        return _collate(dataset, numbers)

    made: Iterator[dict[str, np.ndarray]] = map(make, batches)
    if num_workers > 0:
        made = LoaderProcesses(make, batches, workers=num_workers, timeout_seconds=timeout_seconds)
    return (_checked(_tensors(batch, pin_memory), dataset) for batch in made)


def read_batch(
    dataset: Mixture, numbers: Sequence[int], *, pin_memory: bool = False
) -> dict[str, torch.Tensor]:
    """Read the samples with these numbers in this process, as `build_loader` yields them.

    Raises:
        ConfigError: a sample, named by its number, has an id outside the vocabulary.
    """
    return _checked(_tensors(_collate(dataset, numbers), pin_memory), dataset)


class _RankBatches:
    """Sample numbers of each micro-batch of a rank, computed lazily for runs of any length."""

    def __init__(
        self,
        start: int,
        count: int,
        rows: int,
        dp_rank: int,
        micro_batch_size: int,
        skipped: SkippedSamples,
    ) -> None:
        self._start, self._count, self._rows = start, count, rows
        self._first, self._size = dp_rank * micro_batch_size, micro_batch_size
        self._skipped = skipped

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        position = self._start
        for _ in range(self._count):
            mine = self._skipped.after(position, self._first)
            yield self._skipped.numbers(mine, self._size)
            position = self._skipped.after(position, self._rows)


def _collate(dataset: Mixture, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """Stack samples into arrays, which pickle compactly (unlike tensors)."""
    items: list[dict[str, Any]] = [dataset[i] for i in numbers]
    stacked = ("tokens", "valid", "labels", "reference")
    return {
        **{key: np.stack([item[key] for item in items]) for key in stacked if key in items[0]},
        "samples": np.array(numbers),
    }


def _tensors(batch: dict[str, np.ndarray], pin_memory: bool) -> dict[str, torch.Tensor]:
    tensors = {key: torch.from_numpy(array) for key, array in batch.items()}
    if pin_memory:
        tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
    return tensors


def _checked(batch: dict[str, torch.Tensor], dataset: Mixture) -> dict[str, torch.Tensor]:
    """Check the ids of a batch, which takes microseconds. A tensor-parallel embedding would
    silently return zeros for an id beyond the vocabulary."""
    vocab_size = dataset.source.tokenizer.vocab_size
    low, high = (int(x) for x in batch["tokens"].aminmax())
    if low < 0 or high >= vocab_size:
        bad = ((batch["tokens"] < 0) | (batch["tokens"] >= vocab_size)).any(dim=1)
        sample = int(batch["samples"][bad][0])
        prefix = dataset.source.domains[dataset[sample]["domain"]].prefix
        raise ConfigError(
            f"Sample {sample}, from {prefix}, holds an id outside the vocabulary "
            f"of {vocab_size} ({high if high >= vocab_size else low}). The files have changed "
            "since they were checked; run tools/verify_data.py on them."
        )
    return batch
