"""Plan how much of each domain a run reads, from the `.idx` files alone."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.skipped_samples import SkippedSamples
from megatron_eslm.data.source import DataSource, parse_split
from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class DomainPlan:
    """Plan of one domain. The dictionaries have the keys `train`, `valid` and `test`."""

    name: str
    prefix: str
    weight: float
    documents: dict[str, int]
    tokens: dict[str, int]
    sequences: dict[str, int]
    """Full sequences in one epoch."""
    samples_needed: dict[str, int]
    """Upper bound of the sequences that the run reads or skips (`train`, `valid`)."""
    epochs: float
    """How often training reads the domain."""


@dataclass(frozen=True, kw_only=True)
class MixtureReport:
    """Plan of everything that a run reads."""

    domains: tuple[DomainPlan, ...]
    seq_length: int
    train_samples: int
    valid_samples: int
    """Samples in the validation set; may be fewer than requested."""
    alignment_samples: int = 0
    """Samples of the validation split outside the validation set, for gradient alignment; 0 if not
    requested."""


def plan_mixture(
    source: DataSource,
    options: DataOptions,
    seq_length: int,
    train_samples: int,
    valid_samples: int = 0,
    *,
    aligns: int = 0,
) -> MixtureReport:
    """Count documents, tokens and sequences by split, and how many sequences the run needs.

    Args:
        source: from `open_data`.
        options: `split` is used.
        seq_length: T; a sequence takes T ids plus the first of the next sequence.
        train_samples: samples that the run reads or skips, from the first one on.
        valid_samples: samples requested for validation; 0 for none.
        aligns: minimum number of samples for gradient alignment; 0 for none. They get what
            validation leaves of its split, or half of the split if that would be fewer.

    Raises:
        ConfigError: a domain has less than one sequence in a split that is needed.
    """
    if train_samples < 1 or seq_length < 2:
        raise ConfigError(
            f"Nothing to train on: {train_samples} samples of --seq-length {seq_length} (at least "
            "1 of length 2)."
        )
    counted = []
    reads_valid = valid_samples > 0 or aligns > 0
    for domain in source.domains:
        lengths = read_index(domain.prefix, trust=True).lengths
        ranges = document_ranges(options.split, len(lengths))
        documents = {split: end - begin for split, (begin, end) in ranges.items()}
        tokens = {split: int(lengths[b:e].sum(dtype="int64")) for split, (b, e) in ranges.items()}
        sequences = {split: max(0, (n - 1) // seq_length) for split, n in tokens.items()}
        for split in ("train", "valid") if reads_valid else ("train",):
            if sequences[split] == 0:
                raise ConfigError(
                    f"--data-path {domain.prefix}: the {_LONG[split]} split has {tokens[split]} "
                    f"tokens in {documents[split]} of {len(lengths)} documents; one sequence of "
                    f"--seq-length {seq_length} needs {seq_length + 1}. Give this split a larger "
                    f"share in --split {options.split}, shorten --seq-length or add data"
                    + ("." if split == "train" or aligns else ", or set --eval-iters 0.")
                )
        counted.append((domain, documents, tokens, sequences))
    valid_reach = min(
        (_samples_within(sequences["valid"], domain.weight) for domain, _, _, sequences in counted),
    )
    evaluated = min(valid_samples, valid_reach)
    why = "one epoch by weight has no more"
    if valid_reach - evaluated < aligns:
        evaluated = min(evaluated, valid_reach // 2)
        why = "the other half of its split is reserved for gradient alignment"
    if evaluated < valid_samples:
        logger.info(
            "validation reads %d sequences instead of %d: %s", evaluated, valid_samples, why
        )
    alignment_samples = valid_reach - evaluated if aligns else 0
    plans = []
    for domain, documents, tokens, sequences in counted:
        needed = {
            "train": _samples_at_most(train_samples, domain.weight),
            "valid": _samples_at_most(evaluated + alignment_samples, domain.weight),
        }
        plans.append(
            DomainPlan(
                name=domain.name,
                prefix=domain.prefix,
                weight=domain.weight,
                documents=documents,
                tokens=tokens,
                sequences=sequences,
                samples_needed=needed,
                epochs=needed["train"] / sequences["train"],
            )
        )
    return MixtureReport(
        domains=tuple(plans),
        seq_length=seq_length,
        train_samples=train_samples,
        valid_samples=evaluated,
        alignment_samples=alignment_samples,
    )


def check_epochs(report: MixtureReport, max_epochs: float) -> None:
    """Refuse a run that reads a domain more often than --max-epochs allows.

    Raises:
        ConfigError: names the domain read most often.
    """
    most = max(report.domains, key=lambda domain: domain.epochs)
    if most.epochs > max_epochs * (1 + 1e-9):
        raise ConfigError(
            f"The run reads {most.prefix} {most.epochs:.2f} times ({most.samples_needed['train']} "
            f"sequences of {report.seq_length} ids, one epoch of its training split has "
            f"{most.sequences['train']}), more than --max-epochs {max_epochs:g} allows. Raise "
            f"--max-epochs to allow the repetition, lower --train-iters or the batch size, "
            "lower the weight of this domain, or add data."
        )


def check_skipped(report: MixtureReport, max_epochs: float, skipped: SkippedSamples) -> None:
    """Refuse ranges of skipped samples that reach beyond the data.

    Raises:
        ConfigError: names the range and the last sample.
    """
    end = min(
        _samples_within(math.floor(max_epochs * domain.sequences["train"]), domain.weight)
        for domain in report.domains
    )
    for first, last in skipped.ranges:
        if last > end:
            raise ConfigError(
                f"--skip-samples {first}:{last} reaches beyond the data: with --max-epochs "
                f"{max_epochs:g} and these weights, sample {end - 1} is the last. Give a range "
                "that ends earlier."
            )


def document_ranges(split: str, documents: int) -> dict[str, tuple[int, int]]:
    """Half-open range of documents of each split, computed as in megatron-core."""
    shares = parse_split(split)
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    cuts = [round(edge * float(documents)) for edge in edges]
    return {name: (cuts[i], cuts[i + 1]) for i, name in enumerate(SPLITS)}


_LONG = {"train": "training", "valid": "validation", "test": "test"}

# megatron-core's blending rule takes sample i from the domain with the largest
# weight * i - (samples so far). This maximum is never negative, so of n samples a domain gives at
# most weight * (n - 1) + 1. The epsilon absorbs the rounding of normalized weights.
_EPSILON = 1e-6


def _samples_at_most(num_samples: int, weight: float) -> int:
    """Maximum number of samples that a domain gives to a blend of `num_samples`."""
    if num_samples == 0:
        return 0
    return min(num_samples, math.floor(weight * (num_samples - 1) + 1 + _EPSILON))


def _samples_within(sequences: int, weight: float) -> int:
    """Size of the largest blend to which a domain gives at most `sequences`."""
    if sequences == 0:
        return 0
    return max(1, math.floor((sequences - 2 * _EPSILON) / weight) + 1)
