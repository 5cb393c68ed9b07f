"""Integer limits of megatron-core's data sets, checked before anything overflows."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_eslm.errors import ConfigError


def check_documents(prefix: str, documents: int) -> None:
    """Refuse a pair with more documents than megatron-core's int32 can number.

    Raises:
        ConfigError: 2^31 documents or more.
    """
    if documents >= 2**31:
        raise ConfigError(
            f"{prefix} has {documents:,} documents; megatron-core numbers them in 32 "
            f"bits, so {2**31 - 1:,} is the most. Split it into several pairs and mix them."
        )


def check_domains(count: int) -> None:
    """Refuse a mixture with more domains than the blending rule's int16 can number.

    Raises:
        ConfigError: more than 2^15 domains.
    """
    if count > 2**15:
        raise ConfigError(
            f"A mixture of {count:,} domains: megatron-core numbers them in 16 bits, so "
            f"{2**15:,} is the most. Merge some of them while preprocessing."
        )


def check_order(
    *, seed: int, seq_length: int, train_samples: int, epochs: Mapping[str, float]
) -> None:
    """Refuse a run whose order of samples cannot be computed.

    Args:
        seed: shuffling seed.
        seq_length: T.
        train_samples: sequences that the run reads.
        epochs: how often the run reads each prefix.

    Raises:
        ConfigError: names the flag whose value is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(
            f"--seed {seed} cannot shuffle the data: NumPy takes 0 to {2**32 - 1}. Choose another."
        )
    if seq_length > 2**31 - 2:
        raise ConfigError(
            f"--seq-length {seq_length} is more than megatron-core's 32 bits hold; use at most "
            f"{2**31 - 2}."
        )
    if train_samples >= 2**53:  # the blending rule counts in float64
        raise ConfigError(
            f"The run reads {train_samples:,} sequences, more than can be ordered "
            f"({2**53 - 1:,}). Lower --train-iters or the batch size."
        )
    for prefix, times in epochs.items():
        if times >= 2**31:
            raise ConfigError(
                f"The run reads {prefix} {times:.3g} times; megatron-core counts epochs in 32 "
                "bits. Lower --train-iters or the batch size, or add data."
            )
