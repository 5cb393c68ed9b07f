"""Mix domains by weight into the fixed order of sequences that training and validation read.

megatron-core's GPTDataset packs and shuffles within a domain, and its blending rule interleaves the
domains (the domain furthest behind its weight comes next). The order is a function of (data, seed,
sequence length, split, weights) and never of ranks, micro-batches or workers. As long as no domain
is read more than once, a longer run begins with the samples of a shorter one. Several epochs are
shuffled together by megatron-core, so the order then depends on their number.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.label_noise import LabelNoise
from megatron_eslm.data.limits import check_order
from megatron_eslm.data.megatron_imports import gpt_dataset
from megatron_eslm.data.plan import MixtureReport, document_range, plan_mixture
from megatron_eslm.data.reference_losses import ReferenceLosses
from megatron_eslm.data.shared_folder import shared_folder
from megatron_eslm.data.source import DataSource
from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.ranks import rank_zero_first

VALIDATION_SEED = 1234
"""Independent of --seed, so that runs with different seeds can be compared."""

_CACHE_FORMAT = 2
"""Part of the cache folders' names; increase it to rebuild all caches."""


class Mixture(torch.utils.data.Dataset):
    """Sequences of one split in training order.

    `mixture[i]` is {"tokens": int64 [T+1], "valid": bool [T], "domain": int}; `valid[t]` is False
    where the label `tokens[t+1]` is padding and, under --eod-mask-loss, where `tokens[t]` ends a
    document. A training split also has "labels": int64 [T] under label noise, and "reference":
    float32 [T], the stored losses of a reference model, if requested.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        domain_of: np.ndarray | None,
        index_in_domain: np.ndarray | None,
        num_samples: int,
        source: DataSource,
        reference: ReferenceLosses | None = None,
        noise: LabelNoise | None = None,
    ) -> None:
        # GPTDataset keeps its IndexedDataset alive, which owns the arrays.
        self._parts = tuple(parts)
        self._domain_of = domain_of
        self._index_in_domain = index_in_domain
        self._first = 0
        self._num_samples = num_samples
        self.source = source
        self._reference = reference
        self._noise = noise

    def __len__(self) -> int:
        return self._num_samples

    def part(self, begin: int, end: int) -> Mixture:
        """Return samples `begin` to `end` as a separate validation set."""
        assert self._noise is None and 0 <= begin <= end <= self._num_samples
        part = copy.copy(self)
        part._first, part._num_samples = self._first + begin, end - begin
        return part

    def domain_of(self, i: int) -> int:
        """The domain of sample `i`; does not read the sample."""
        return 0 if self._domain_of is None else int(self._domain_of[self._first + i])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self._num_samples:
            raise IndexError(f"sample {i} of {self._num_samples}")
        domain, index = 0, self._first + i
        if self._domain_of is not None and self._index_in_domain is not None:
            domain, index = int(self._domain_of[index]), int(self._index_in_domain[index])
        item = self._parts[domain][index]
        sample: dict[str, Any] = {
            "tokens": torch.cat((item["tokens"], item["labels"][-1:])),
            "valid": item["loss_mask"] > 0,
            "domain": domain,
        }
        if self._noise is not None:
            sample["labels"] = self._noise(sample["tokens"][1:], sample["valid"], i)
        if self._reference is not None:
            losses_T = self._reference.of_sample(domain, self._parts[domain], index)
            sample["reference"] = torch.from_numpy(losses_T)
        return sample


@dataclass(frozen=True)
class Datasets:
    """The data sets of a run."""

    train: Mixture
    valid: Mixture | None
    """None if no validation samples were requested."""
    report: MixtureReport
    alignment: Mixture | None = None
    """Sequences of the validation split after those of `valid`, for policies that select by
    gradient alignment; selection must not use the evaluated sequences. None if not requested."""
    test: Mixture | None = None
    """Sequences of --test-data-path; None without it."""


@dataclass(frozen=True)
class _DatasetTokenizer:
    """Interface that GPTDataset expects; puts the fingerprint into megatron-core's cache key."""

    vocab_size: int
    eod: int
    pad: int
    unique_identifiers: OrderedDict[str, Any]


def build_datasets(
    source: DataSource,
    options: DataOptions,
    *,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    test_samples: int = 0,
    aligns: int = 0,
    reference: ReferenceLosses | None = None,
) -> Datasets:
    """Build the training and validation data sets.

    If torch.distributed is initialized, every rank must call this: rank 0 builds the index cache,
    the others read it. An error on any rank is raised on all.

    Args:
        source: from `open_data`.
        options: cache folder, --eod-mask-loss and --label-noise are used.
        seq_length: T; samples have T+1 ids.
        train_samples: samples that the run reads or skips.
        valid_samples: maximum size of the validation set, which is the same at every evaluation.
            It is smaller if one epoch of the domains, in proportion to their weights, has less.
        test_samples: the same for the test set, if it has files of its own.
        seed: seed of the shuffling of training sequences and of the label noise.
        aligns: minimum number of sequences for gradient alignment; 0 for none. They get what
            validation leaves of its split, or half of the split if that would be fewer.
        reference: stored losses to read with the training tokens.

    Raises:
        ConfigError: a split is too small for one sequence, a size exceeds an integer limit, or the
            cache folder cannot be used.
    """
    report = plan_mixture(
        source,
        seq_length=seq_length,
        train_samples=train_samples,
        valid_samples=valid_samples,
        test_samples=test_samples,
        aligns=aligns,
    )
    check_order(
        seed=seed,
        seq_length=seq_length,
        train_samples=train_samples,
        epochs={domain.prefix: domain.epochs for domain in report.domains},
    )

    noise = LabelNoise(share=options.label_noise, seed=seed) if options.label_noise else None
    extras = {"train": (seed, reference, noise)}

    def build() -> Datasets:
        evaluated, held_out = report.valid_samples, report.alignment_samples
        wanted = {
            "train": report.train_samples,
            "valid": evaluated + held_out,
            "test": report.test_samples,
        }
        made = {
            split: _build_split(
                source, options, report, split, count, *extras.get(split, (VALIDATION_SEED,))
            )
            for split, count in wanted.items()
            if count > 0
        }
        both = made.get("valid")
        return Datasets(
            train=made["train"],
            valid=both.part(0, evaluated) if both is not None and evaluated else None,
            report=report,
            alignment=both.part(evaluated, len(both)) if both is not None and aligns else None,
            test=made.get("test"),
        )

    return rank_zero_first(build)


def _build_split(
    source: DataSource,
    options: DataOptions,
    report: MixtureReport,
    split: str,
    num_samples: int,
    seed: int,
    reference: ReferenceLosses | None = None,
    noise: LabelNoise | None = None,
) -> Mixture:
    root = options.data_cache_path or os.path.join(
        os.path.dirname(source.domains[0].prefix), "cache"
    )
    files = source.of(split)
    assert files is not None  # `plan_mixture` counted it
    source, parts = files, []
    for domain, plan in zip(source.domains, report.by_split[split], strict=True):
        have, need = plan.sequences[split], plan.samples_needed[split]
        # Round up to full epochs, so that runs of any length share the order and the cache. None
        # is one epoch.
        count = None if need <= have else -(-need // have) * have
        key = [source.fingerprint, domain.prefix, split, count, report.seq_length, seed]
        key += [source.split, options.eod_mask_loss]
        parts.append(
            _cached(
                root,
                f"{os.path.basename(domain.prefix)}-{split}",
                key,
                lambda folder, d=domain, c=count: _gpt_dataset(  # type: ignore[misc]
                    source, options, d.prefix, split, c, report.seq_length, seed, folder
                ),
            )
        )
    if len(parts) == 1:
        return Mixture(parts, None, None, num_samples, source, reference, noise)
    weights = [domain.weight for domain in source.domains]
    domain_of, index_in_domain = _cached(
        root,
        f"blend-{split}",
        [source.weights, num_samples],
        lambda folder: _blend(folder, weights, num_samples),
    )
    for d, part in enumerate(parts):
        used = int(np.count_nonzero(domain_of == d))
        assert used <= len(part), f"{source.domains[d].name}: {used} samples of {len(part)}"
    return Mixture(parts, domain_of, index_in_domain, num_samples, source, reference, noise)


def _gpt_dataset(
    source: DataSource,
    options: DataOptions,
    prefix: str,
    split: str,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    folder: str,
) -> Any:
    mcore = gpt_dataset()
    identifiers = source.tokenizer.unique_identifiers
    identifiers["data"] = source.fingerprint
    config = mcore.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([prefix], None),
        split=source.split or "1,0,0",  # documents are chosen below
        path_to_cache=folder,
        tokenizer=_DatasetTokenizer(
            source.tokenizer.vocab_size, source.tokenizer.eod, source.tokenizer.pad, identifiers
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=options.eod_mask_loss,
        create_attention_mask=False,
    )
    low_level = mcore.GPTDataset.build_low_level_dataset(prefix, config)
    begin, end = document_range(source.split, split, len(low_level))
    return mcore.GPTDataset(
        low_level,
        prefix,
        np.arange(begin, end, dtype=np.int32),
        num_samples,
        mcore.Split[split],
        config,
    )


def _blend(folder: str, weights: list[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Domain of each sample (int16) and its number in the domain (int64), both [num_samples]."""
    paths = [os.path.join(folder, name) for name in ("domain.npy", "index.npy")]
    if not all(map(os.path.exists, paths)):
        from megatron.core.datasets import helpers

        domain_of = np.zeros(num_samples, dtype=np.int16)
        index_in_domain = np.zeros(num_samples, dtype=np.int64)
        helpers.build_blending_indices(
            domain_of, index_in_domain, weights, len(weights), num_samples, False
        )
        np.save(paths[0], domain_of)
        np.save(paths[1], index_in_domain)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r")


def _check_arrays(folder: Path) -> None:
    """Raise ValueError unless all arrays in a folder are complete and free of pickled objects.

    megatron-core would unpickle arrays of objects, which can execute code.
    """
    for path in folder.glob("*.npy"):
        np.load(path, mmap_mode="r", allow_pickle=False)


def _cached(root: str, label: str, key: list[Any], make: Callable[[str], Any]) -> Any:
    """Return `make(folder)` for a cache folder in `root` shared by all runs with this key.

    `make` writes its indices into an empty folder and reads them from a complete one.
    """
    key = [_CACHE_FORMAT, *key]
    name = f"{label}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}"
    folder = Path(root, name)
    where = "name one with --data-cache-path"

    def build(aside: Path) -> None:
        make(str(aside))
        try:
            _check_arrays(aside)
        except ValueError as error:
            # NumPy does not notice when a full disk truncates an array.
            raise OSError(errno.ENOSPC, f"the disk took only part of it ({error})") from error

    try:
        shared_folder(folder, build, where)
        _check_arrays(folder)
        return make(str(folder))
    except OSError as error:
        raise ConfigError(
            f"The index cache {folder} cannot be written or read: {error}. With --data-cache-path, "
            "name a folder with free space and write permission."
        ) from error
    except MemoryError as error:
        raise ConfigError(
            f"The index cache {folder} cannot be built: {error or 'out of memory'}. Train on fewer "
            "samples or use a machine with more memory."
        ) from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The index cache {folder} is damaged ({error}). Delete it; the next run rebuilds it."
        ) from error
