"""Label noise: a share of each sequence's next-token targets, permuted among themselves.

As in the paper's robustness experiment, which permutes 5% of the targets. Which targets, and how,
is a function of the seed and the sample's number in the run, so no layout and no resume changes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.seeding import generator


@dataclass(frozen=True, kw_only=True)
class LabelNoise:
    """`noise(labels, valid, sample)` permutes a share of the labels that count."""

    share: float
    seed: int

    def __call__(self, labels_T: torch.Tensor, valid_T: torch.Tensor, sample: int) -> torch.Tensor:
        """The labels of one sequence with noise.

        Args:
            labels_T: int64 [T]; not changed.
            valid_T: bool [T], which of them count; the others are left as they are.
            sample: number of the sequence in the run.

        Returns:
            int64 [T]. Of the n valid labels round(share * n), drawn without replacement, each take
            the label of another one of them, in one cycle. Where the two are the same token nothing
            changes.
        """
        places_N = valid_T.nonzero().squeeze(1)
        rng = generator(self.seed, "label noise", sample)
        drawn = torch.randperm(len(places_N), generator=rng)[: round(self.share * len(places_N))]
        places_K = places_N[drawn]
        noisy_T = labels_T.clone()
        noisy_T[places_K] = labels_T[places_K.roll(1)]
        return noisy_T


def check_label_noise(share: float, seq_length: int) -> None:
    """ConfigError where a share is so small that no sequence of `seq_length` has any noise."""
    if share > 0 and round(share * seq_length) < 2:
        raise ConfigError(
            f"--label-noise {share:g} of --seq-length {seq_length} is less than two targets a "
            f"sequence, and one alone cannot be permuted. Use at least {2 / seq_length:.3g}."
        )
