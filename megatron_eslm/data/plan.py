"""Plan how much of each domain a run reads, from the `.idx` files alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.skipped_samples import SkippedSamples
from megatron_eslm.data.source import DataSource, Domain, parse_split
from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class DomainPlan:
    """Plan of one domain. The dictionaries have the sets that its files hold: `train`, `valid` and
    `test`, or one of them where each set has files of its own."""

    name: str
    prefix: str
    weight: float
    documents: dict[str, int]
    tokens: dict[str, int]
    sequences: dict[str, int]
    """Full sequences in one epoch."""
    samples_needed: dict[str, int]
    """Upper bound of the sequences that the run reads or skips."""

    @property
    def epochs(self) -> float:
        """How often training reads the domain."""
        return self.samples_needed["train"] / self.sequences["train"]


@dataclass(frozen=True, kw_only=True)
class MixtureReport:
    """Plan of everything that a run reads."""

    by_split: Mapping[str, tuple[DomainPlan, ...]]
    """Domains that `train`, `valid` and `test` are read from; the sets that are not read may be
    missing."""
    seq_length: int
    train_samples: int
    valid_samples: int
    """Samples in the validation set; may be fewer than requested."""
    alignment_samples: int = 0
    """Samples of the validation split outside the validation set, for gradient alignment; 0 if not
    requested."""
    test_samples: int = 0
    """Samples in the test set of --test-data-path; 0 without it."""

    @property
    def has_files_apart(self) -> bool:
        """Whether each set has files of its own."""
        return set(self.domains[0].documents) == {"train"}

    @property
    def domains(self) -> tuple[DomainPlan, ...]:
        """Domains that are trained on."""
        return self.by_split["train"]


def plan_mixture(
    source: DataSource,
    seq_length: int,
    train_samples: int,
    valid_samples: int = 0,
    *,
    test_samples: int = 0,
    aligns: int = 0,
) -> MixtureReport:
    """Count documents, tokens and sequences by split, and how many sequences the run needs.

    Args:
        source: from `open_data`.
        seq_length: T; a sequence takes T ids plus the first of the next sequence.
        train_samples: samples that the run reads or skips, from the first one on.
        valid_samples: samples requested for validation; 0 for none.
        test_samples: samples requested of --test-data-path, if it is given.
        aligns: minimum number of samples for gradient alignment; 0 for none. They get what
            validation leaves of its split, or half of the split if that would be fewer.

    Raises:
        ConfigError: a domain has less than one sequence in a split that is needed, or no files
            hold the split.
    """
    if train_samples < 1 or seq_length < 2:
        raise ConfigError(
            f"Nothing to train on: {train_samples} samples of --seq-length {seq_length} (at least "
            "1 of length 2)."
        )
    counted = {
        "train": [_count(domain, source.split, "train", seq_length) for domain in source.domains]
    }
    needed = {"train": train_samples}
    for split, samples, reads in (
        ("valid", valid_samples, valid_samples > 0 or aligns > 0),
        ("test", test_samples, test_samples > 0 and "test" in source.apart),
    ):
        files = source.of(split)
        if files is source:
            counted[split] = counted["train"]
        elif reads and files is not None:
            counted[split] = [_count(domain, None, split, seq_length) for domain in files.domains]
        elif reads:
            raise ConfigError(
                "--train-data-path comes without --valid-data-path, so there is nothing to "
                "validate on. Give it"
                + (", which the selection needs." if aligns else _or_no_evaluation(source))
            )
        if reads:
            needed[split] = samples
    for split in needed:
        remedy = "." if split == "train" or aligns else _or_no_evaluation(source)
        _check_sequences(counted[split], split, source.split, seq_length, remedy)
    alignment_samples = 0
    if "valid" in needed:
        reach = _reach(counted["valid"], "valid")
        evaluated = min(valid_samples, reach)
        why = "one epoch by weight has no more"
        if reach - evaluated < aligns:
            evaluated = min(evaluated, reach // 2)
            why = "the other half of its split is reserved for gradient alignment"
        if evaluated < valid_samples:
            logger.info(
                "validation reads %d sequences instead of %d: %s", evaluated, valid_samples, why
            )
        alignment_samples = reach - evaluated if aligns else 0
        needed["valid"] = evaluated + alignment_samples
    if "test" in needed:
        needed["test"] = min(needed["test"], _reach(counted["test"], "test"))
    return MixtureReport(
        by_split={split: _plans(domains, needed) for split, domains in counted.items()},
        seq_length=seq_length,
        train_samples=train_samples,
        valid_samples=needed.get("valid", 0) - alignment_samples,
        alignment_samples=alignment_samples,
        test_samples=needed.get("test", 0),
    )


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """Contents of a domain by the sets that its files hold."""

    domain: Domain
    documents: dict[str, int]
    tokens: dict[str, int]
    sequences: dict[str, int]


def _count(domain: Domain, divided: str | None, split: str, seq_length: int) -> _Counted:
    """Count the sets of one domain: all that --split divides it into, or the one that it is."""
    lengths = read_index(domain.prefix, trust=True).lengths
    ranges = {name: document_range(divided, name, len(lengths)) for name in SPLITS}
    if divided is None:
        ranges = {split: ranges[split]}
    tokens = {name: int(lengths[b:e].sum(dtype="int64")) for name, (b, e) in ranges.items()}
    return _Counted(
        domain=domain,
        documents={name: end - begin for name, (begin, end) in ranges.items()},
        tokens=tokens,
        sequences={name: max(0, (n - 1) // seq_length) for name, n in tokens.items()},
    )


def _check_sequences(
    counted: Sequence[_Counted], split: str, divided: str | None, seq_length: int, remedy: str
) -> None:
    for one in counted:
        if one.sequences[split]:
            continue
        share = (
            f"Give this split a larger share in --split {divided}, shorten"
            if divided
            else "Shorten"
        )
        raise ConfigError(
            f"{one.domain.prefix}: the {_LONG[split]} split has {one.tokens[split]} tokens in "
            f"{one.documents[split]} of {one.domain.documents} documents; one sequence of "
            f"--seq-length {seq_length} needs {seq_length + 1}. {share} --seq-length or add data"
            f"{remedy}"
        )


def _or_no_evaluation(source: DataSource) -> str:
    """How to do without evaluation: what comes last in a message."""
    paths = [f"--{name}-data-path" for name in source.apart]
    without = f" and leave out {' and '.join(paths)}" if paths else ""
    return f", or set --eval-iters 0{without}."


def _reach(counted: Sequence[_Counted], split: str) -> int:
    """Samples until the first domain would be read again."""
    return min(_samples_within(one.sequences[split], one.domain.weight) for one in counted)


def _plans(counted: Sequence[_Counted], needed: Mapping[str, int]) -> tuple[DomainPlan, ...]:
    return tuple(
        DomainPlan(
            name=one.domain.name,
            prefix=one.domain.prefix,
            weight=one.domain.weight,
            documents=one.documents,
            tokens=one.tokens,
            sequences=one.sequences,
            samples_needed={
                split: _samples_at_most(needed.get(split, 0), one.domain.weight)
                for split in one.sequences
            },
        )
        for one in counted
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


def document_range(divided: str | None, split: str, documents: int) -> tuple[int, int]:
    """Half-open range of documents of one set, by --split or, with None, all of them."""
    return (0, documents) if divided is None else document_ranges(divided, documents)[split]


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
