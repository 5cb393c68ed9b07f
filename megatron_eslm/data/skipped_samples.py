"""Ranges of samples that training skips: `--skip-samples A:B ...`.

A position is a number of consumed samples: sample `position` comes next, and all samples before it
have been read or skipped. Skipped samples keep their numbers, so later samples do not move.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eslm.errors import ConfigError

Ranges = tuple[tuple[int, int], ...]
"""(first sample, one past the last) of each range."""


def parse_ranges(words: Sequence[str]) -> Ranges:
    """Parse the words of `--skip-samples`, in their order.

    Raises:
        ConfigError: a word is not A:B, or A is not below B.
    """
    ranges = []
    for word in words:
        match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", word)
        if match is None:
            raise ConfigError(
                f"--skip-samples {word} is not a range of sample numbers; write A:B, as in "
                "1000:1200 (in a YAML file in quotes)."
            )
        begin, end = int(match[1]), int(match[2])
        if begin >= end:
            raise ConfigError(
                f"--skip-samples {word} is empty: A:B leaves out samples A to B - 1, so A must be "
                "smaller than B."
            )
        ranges.append((begin, end))
    return tuple(ranges)


def _union(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Merge ranges into sorted ranges that do not touch."""
    united: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if united and begin <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], end))
        else:
            united.append((begin, end))
    return tuple(united)


@dataclass(frozen=True)
class SkippedSamples:
    """The set of samples that training skips."""

    ranges: Ranges = ()
    """Sorted; no two touch."""

    @classmethod
    def of(cls, *several: Ranges) -> SkippedSamples:
        """Union of several lists of ranges."""
        return cls(_union([part for ranges in several for part in ranges]))

    def covers(self, begin: int, end: int) -> bool:
        """Whether every sample from `begin` to `end` - 1 is skipped."""
        return any(first <= begin and end <= last for first, last in self.ranges)

    def after(self, position: int, count: int) -> int:
        """The position after reading the next `count` samples from `position` on."""
        for begin, end in self.ranges:
            if end <= position:
                continue
            free = max(0, begin - position)
            if count <= free:
                break
            position, count = end, count - free
        return position + count

    def numbers(self, position: int, count: int) -> list[int]:
        """The numbers of the next `count` samples to read from `position` on."""
        found: list[int] = []
        for begin, end in self.ranges:
            if end <= position:
                continue
            free = min(count - len(found), max(0, begin - position))
            found += range(position, position + free)
            if len(found) == count:
                return found
            position = end
        return [*found, *range(position, position + count - len(found))]

    def between(self, begin: int, end: int) -> int:
        """How many samples from `begin` to `end` - 1 are skipped."""
        return sum(max(0, min(last, end) - max(first, begin)) for first, last in self.ranges)

    def __str__(self) -> str:
        return " ".join(f"{begin}:{end}" for begin, end in self.ranges)


def join_skipped(given: Ranges, recorded: Ranges, position: int) -> SkippedSamples:
    """Join the ranges given to a run with those recorded in its checkpoint.

    Args:
        given: ranges of `--skip-samples`.
        recorded: ranges in the checkpoint; they may lie before the position.
        position: position from which the run continues.

    Raises:
        ConfigError: a given range begins before the position and is not among the recorded ones.
    """
    before = SkippedSamples.of(recorded)
    for begin, end in given:
        if begin < position and not before.covers(begin, end):
            last = min(end, position) - 1
            remedy = f"Skip {position}:{end}" if end > position else "Leave it out"
            raise ConfigError(
                f"--skip-samples {begin}:{end} begins before sample {position}, where the "
                f"checkpoint of --load continues, but samples {begin} to {last} were already "
                f"consumed. {remedy}, or load a checkpoint from before sample {begin}."
            )
    return SkippedSamples.of(given, recorded)
