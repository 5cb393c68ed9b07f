"""Open the data of a run: check every file, find the common tokenizer, compute fingerprints."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction

from megatron_eslm.data.contents import check_ends, check_ids, check_meta, check_sum, fingerprint
from megatron_eslm.data.data_options import DEFAULT_SPLIT, DataOptions
from megatron_eslm.data.document_ends import check_document_ends
from megatron_eslm.data.index_file import IndexFile, read_index
from megatron_eslm.data.limits import check_domains
from megatron_eslm.data.meta import DataMeta, read_meta
from megatron_eslm.data.tokenizers.build import Tokenizer, build_tokenizer, load_tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import flag_of
from megatron_eslm.parallel.ranks import first_on_machine, has_group, rank_zero_first

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One `.bin/.idx` pair of the mixture."""

    name: str
    prefix: str
    weight: float
    """Share of the tokens read; the weights of a source add up to 1. Equal proportions give equal
    numbers, however they are written."""
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """The data of a run: domains, weights and tokenizer."""

    tokenizer: Tokenizer
    domains: tuple[Domain, ...]
    weights: tuple[int, ...]
    """Weights of the domains in lowest terms: 1, 2, 7 for 0.1, 0.2, 0.7."""
    fingerprint: str
    """Depends on the contents of all files and on the tokenizer, not on paths or weights. Checked
    against the checkpoint at resume."""
    split: str | None
    """Canonical `--split` that divides the documents; None if all are of one set, because each set
    has files of its own."""
    apart: Mapping[str, DataSource] = field(default_factory=dict)
    """`valid` and `test` beside `--train-data-path`, where they are given."""

    def of(self, split: str) -> DataSource | None:
        """The files that hold `train`, `valid` or `test`; None if there are none."""
        return self if split == "train" or self.split is not None else self.apart.get(split)


def open_data(options: DataOptions) -> DataSource:
    """Run all checks that are possible before training and return the data source.

    If torch.distributed is initialized, every rank must call this. Rank 0 and the first rank of
    each other machine read all files in full; the others trust them. An error on any rank, such as
    different data on another machine, is raised on all.

    Raises:
        ConfigError: anything about the paths, their files or the tokenizer flags is wrong.
    """
    source = rank_zero_first(lambda: _open(options, trust=not first_on_machine()))
    if has_group():
        from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero

        for each in (source, *source.apart.values()):
            expected = on_rank_zero(lambda each=each: each.fingerprint)  # type: ignore[misc]
            on_every_rank(lambda each=each, expected=expected: _check_same(each, expected))  # type: ignore[misc]
    return source


def _check_same(source: DataSource, expected: str) -> None:
    if source.fingerprint != expected:
        raise ConfigError(
            f"{' '.join(domain.prefix for domain in source.domains)} is different data here than "
            "on the machine of rank 0. Copy the same files to all machines, or name a folder that "
            "they share."
        )


def _open(options: DataOptions, *, trust: bool) -> DataSource:
    split = None if options.train_data_path else canonical_split(options.split or DEFAULT_SPLIT)
    mixtures = mixtures_of(options)
    pairs = [pair for mixture in mixtures.values() for pair in mixture]
    _check_disjoint(mixtures)
    for mixture in mixtures.values():
        check_domains(len(mixture))
    indexes = [read_index(prefix, trust=trust) for _, prefix in pairs]
    metas = [read_meta(prefix) for _, prefix in pairs]
    for index, meta in zip(indexes, metas, strict=True):
        if meta is not None:
            check_meta(index, meta)
    tokenizer = _common_tokenizer(options, [prefix for _, prefix in pairs], metas)
    for index, meta in zip(indexes, metas, strict=True):
        if not trust:
            _check_contents(index, meta, tokenizer)
    relying = [
        flag
        for flag, is_set in (
            ("--eod-mask-loss", options.eod_mask_loss),
            ("--reset-attention-mask", options.reset_attention_mask),
            ("--reset-position-ids", options.reset_position_ids),
        )
        if is_set
    ]
    check_document_ends(zip(indexes, metas, strict=True), tokenizer.eod, relying)
    opened = dict(
        zip((prefix for _, prefix in pairs), zip(indexes, metas, strict=True), strict=True)
    )
    sources = {
        name: _source(mixture, [opened[prefix] for _, prefix in mixture], tokenizer, split)
        for name, mixture in mixtures.items()
    }
    train = sources.pop("train")
    return replace(train, apart=sources)


def mixtures_of(options: DataOptions) -> dict[str, list[tuple[Fraction, str]]]:
    """(weight, prefix) pairs by set: `train` of --data-path or --train-data-path, and with the
    latter `valid` and `test` where they are given; errors as in `parse_data_path`."""
    if not options.train_data_path:
        return {"train": parse_data_path(options.data_path)}
    given = {name: getattr(options, f"{name}_data_path") for name in ("train", "valid", "test")}
    return {
        name: parse_data_path(words, flag_of(f"{name}_data_path"))
        for name, words in given.items()
        if words
    }


def _check_disjoint(mixtures: Mapping[str, list[tuple[Fraction, str]]]) -> None:
    """Raise ConfigError if two sets name one pair: what is trained on measures nothing."""
    seen: dict[str, str] = {}
    for name, mixture in mixtures.items():
        for _, prefix in mixture:
            other = seen.setdefault(os.path.realpath(prefix), name)
            if other != name:
                raise ConfigError(
                    f"--{name}-data-path names {prefix}, which --{other}-data-path names too. "
                    "Give each set files of its own, or divide one with --data-path and --split."
                )


def _source(
    mixture: list[tuple[Fraction, str]],
    opened: list[tuple[IndexFile, DataMeta | None]],
    tokenizer: Tokenizer,
    split: str | None,
) -> DataSource:
    weights = lowest_terms([weight for weight, _ in mixture])
    names = _names([prefix for _, prefix in mixture])
    digest = hashlib.sha256(tokenizer.identity.encode())
    for index, meta in opened:
        digest.update(fingerprint(index, meta).encode())
    return DataSource(
        tokenizer=tokenizer,
        domains=tuple(
            Domain(
                name=name,
                prefix=index.prefix,
                weight=weight / sum(weights),
                documents=index.documents,
                tokens=index.tokens,
            )
            for name, weight, (index, _) in zip(names, weights, opened, strict=True)
        ),
        weights=weights,
        fingerprint=digest.hexdigest(),
        split=split,
    )


def _check_contents(index: IndexFile, meta: DataMeta | None, tokenizer: Tokenizer) -> None:
    if meta is None:
        logger.warning(
            "%s has no %s.meta.json, so it cannot be verified that its tokenizer is the given %s",
            index.prefix,
            os.path.basename(index.prefix),
            tokenizer.name,
        )
        check_ids(index, tokenizer)
        return
    if meta.max_token_id >= tokenizer.vocab_size:
        raise ConfigError(
            f"{index.prefix} holds the id {meta.max_token_id}, beyond the "
            f"vocabulary of {tokenizer.vocab_size}; preprocess it again."
        )
    check_sum(index.prefix, ".idx", meta.idx_sha256)
    check_ends(index, meta, tokenizer.eod, every=False)


def lowest_terms(numbers: Sequence[Fraction]) -> tuple[int, ...]:
    """Convert to integers in the same proportion without a common factor; not all may be 0.

    Weights and shares are compared and converted to floats only in this form: 0.1 0.2 0.7, 1 2 7
    and 0.3 0.6 2.1 differ as floats, and a single rounding error can change the order of samples.
    """
    scale = math.lcm(*(number.denominator for number in numbers))
    whole = [int(number * scale) for number in numbers]
    factor = math.gcd(*whole)
    return tuple(number // factor for number in whole)


def _exact(word: str) -> Fraction | None:
    """Parse an exact number; None for nan and infinity, ValueError if it is not a number."""
    rounded = float(word)  # also keeps exponents within bounds
    if not math.isfinite(rounded):
        return None
    return Fraction(Decimal(word)) if rounded else Fraction(0)


def parse_data_path(words: Sequence[str], flag: str = "--data-path") -> list[tuple[Fraction, str]]:
    """`prefix` or `weight1 prefix1 weight2 prefix2 ...` as (weight, prefix) pairs.

    Args:
        words: of the flag.
        flag: for messages.

    Raises:
        ConfigError: no words, an odd number of words, a weight that is not a positive number, or a
            prefix given twice.
    """
    if not words:
        raise ConfigError(f"{flag} is empty; give a prefix, or weight and prefix pairs.")
    if len(words) == 1:
        return [(Fraction(1), words[0])]
    if len(words) % 2:
        raise ConfigError(
            f"{flag} has {len(words)} words ({' '.join(words)}); give one prefix alone, or a "
            "weight before every prefix: 0.7 a 0.3 b."
        )
    pairs: list[tuple[Fraction, str]] = []
    seen: dict[str, str] = {}
    for word, prefix in zip(words[::2], words[1::2], strict=True):
        try:
            weight = _exact(word)
        except ValueError:
            raise ConfigError(
                f"{flag}: {word!r} before {prefix} should be that prefix's weight, but is not "
                "a number. Write weight1 prefix1 weight2 prefix2."
            ) from None
        if weight is None or weight <= 0:
            raise ConfigError(
                f"{flag}: the weight {word} of {prefix} must be positive; leave out a domain "
                "that should not be read."
            )
        real = os.path.realpath(prefix)
        if real in seen:
            raise ConfigError(
                f"{flag} names {prefix} twice (as {seen[real]} and {prefix}); add the two "
                "weights and name it once."
            )
        seen[real] = prefix
        pairs.append((weight, prefix))
    return pairs


def canonical_data_path(words: Sequence[str]) -> str:
    """Canonical form of `--data-path`, with weights in lowest terms; equal for equal mixtures."""
    pairs = parse_data_path(words)
    if len(pairs) == 1:
        return pairs[0][1]
    weights = lowest_terms([weight for weight, _ in pairs])
    return " ".join(
        f"{weight} {prefix}" for weight, (_, prefix) in zip(weights, pairs, strict=True)
    )


def split_parts(split: str) -> tuple[int, int, int]:
    """Parse `--split` into the shares of training, validation and test, in lowest terms.

    Raises:
        ConfigError: not one to three numbers, a negative one, or nothing for training.
    """
    try:
        shares = [_exact(word) for word in split.split(",")]
    except ValueError:
        raise ConfigError(
            f"--split {split!r} is not a list of numbers; write three shares, as in 98,1,1."
        ) from None
    known = [share for share in shares if share is not None and share >= 0]
    if len(shares) > 3 or len(known) < len(shares):
        raise ConfigError(
            f"--split {split!r} must be at most three numbers, none negative, as in 98,1,1."
        )
    if known[0] == 0:
        raise ConfigError(f"--split {split!r} leaves nothing for training; write e.g. 98,1,1.")
    train, valid, test = lowest_terms([*known, *[Fraction(0)] * (3 - len(known))])
    if max(train, valid, test) > 10**100:  # megatron-core adds them up as floats
        raise ConfigError(
            f"--split {split!r} has numbers of very unequal size; write shares as in 98,1,1."
        )
    return train, valid, test


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of training, validation and test, adding up to 1; errors as in `split_parts`."""
    train, valid, test = split_parts(split)
    total = train + valid + test
    return train / total, valid / total, test / total


def canonical_split(split: str) -> str:
    """Canonical form, the same for equal splits: 40,9,1 for 0.8,0.18,0.02 and for 80,18,2."""
    return ",".join(map(str, split_parts(split)))


def tokenizer_of(options: DataOptions) -> Tokenizer:
    """The tokenizer of the data, without a look at the ids; errors as in `open_data`."""
    prefixes = [prefix for mixture in mixtures_of(options).values() for _, prefix in mixture]
    return _common_tokenizer(options, prefixes, [read_meta(prefix) for prefix in prefixes])


def _common_tokenizer(
    options: DataOptions, prefixes: list[str], metas: list[DataMeta | None]
) -> Tokenizer:
    given = None
    files = (options.vocab_file, options.merge_file, options.tokenizer_model)
    if options.tokenizer_type is not None:
        given = build_tokenizer(options.tokenizer_type, *files)
    elif any(file is not None for file in files):
        raise ConfigError(
            "--vocab-file, --merge-file and --tokenizer-model have no effect without "
            "--tokenizer-type; add it, or leave them out to use the tokenizer stored beside the "
            "data."
        )
    known = [(p, m) for p, m in zip(prefixes, metas, strict=True) if m is not None]
    for prefix, meta in known[1:]:
        if meta.tokenizer["identity"] != known[0][1].tokenizer["identity"]:
            raise ConfigError(
                f"{known[0][0]} was made with {_show(known[0][1])} and {prefix} with "
                f"{_show(meta)}. Preprocess them with one tokenizer."
            )
    if given is not None:
        for prefix, meta in known:
            if meta.tokenizer["identity"] != given.identity:
                raise ConfigError(
                    f"--tokenizer-type {given.name} describes the tokenizer {given.name} "
                    f"{given.identity[:12]}, but {prefix} was made with {_show(meta)}. Leave the "
                    "tokenizer flags out to use the one stored beside the data, or preprocess it "
                    "again."
                )
        return given
    without = [p for p, m in zip(prefixes, metas, strict=True) if m is None]
    if without:
        raise ConfigError(
            f"{without[0]} has no {without[0]}.meta.json (it was not written by "
            "tools/preprocess_data.py), so its tokenizer is unknown. Name it: --tokenizer-type and "
            "its files."
        )
    prefix, meta = known[0]
    tokenizer = load_tokenizer(f"{prefix}.tokenizer")
    if tokenizer.identity != meta.tokenizer["identity"]:
        raise ConfigError(
            f"{prefix}.tokenizer holds {tokenizer.name} {tokenizer.identity[:12]}, but the data "
            f"was made with {_show(meta)}. Put the original folder back, or name the tokenizer "
            "with --tokenizer-type and its files."
        )
    return tokenizer


def _show(meta: DataMeta) -> str:
    return f"{meta.tokenizer.get('type')} {meta.tokenizer['identity'][:12]}"


def _names(prefixes: list[str]) -> list[str]:
    short = [os.path.basename(prefix) for prefix in prefixes]
    return short if len(set(short)) == len(short) else list(prefixes)
