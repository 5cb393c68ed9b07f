"""Label noise: permutes a share of each sequence's next-token targets.

The paper's robustness experiment permutes 5% of the targets. The permutation depends only on the
seed and the sample's number in the run, so it is independent of layout and resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.seeding import generator


@dataclass(frozen=True, kw_only=True)
class LabelNoise:
    """`noise(labels, valid, sample)` permutes a share of the valid labels."""

    share: float
    seed: int

    def __call__(self, labels_T: torch.Tensor, valid_T: torch.Tensor, sample: int) -> torch.Tensor:
        """Add noise to the labels of one sequence.

        Args:
            labels_T: int64 [T]; not changed.
            valid_T: bool [T], which labels count; the others are left unchanged.
            sample: number of the sequence in the run.

        Returns:
            int64 [T]. Draws round(share * n) of the n valid labels without replacement and shifts
            them along one cycle. A label does not change if the other is the same token.
        """
        places_N = valid_T.nonzero().squeeze(1)
        rng = generator(self.seed, "label noise", sample)
        drawn = torch.randperm(len(places_N), generator=rng)[: round(self.share * len(places_N))]
        places_K = places_N[drawn]
        noisy_T = labels_T.clone()
        noisy_T[places_K] = labels_T[places_K.roll(1)]
        return noisy_T


def check_label_noise(share: float, seq_length: int) -> None:
    """Raise ConfigError if `share` is so small that no sequence of `seq_length` gets any noise."""
    if share > 0 and round(share * seq_length) < 2:
        raise ConfigError(
            f"--label-noise {share:g} of --seq-length {seq_length} is less than two targets per "
            f"sequence, and one alone cannot be permuted. Use at least {2 / seq_length:.3g}."
        )
