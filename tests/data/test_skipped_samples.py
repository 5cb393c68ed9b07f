"""Ranges of samples that are passed over: their syntax, counting with them, joining them."""

from __future__ import annotations

import pytest

from megatron_eslm.data.skipped_samples import SkippedSamples, join_skipped, parse_ranges
from megatron_eslm.errors import ConfigError


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("10-20", r"--skip-samples 10-20 is not a range of sample numbers; write A:B"),
        ("620", "is not a range"),  # what YAML makes of 10:20 without quotes
        ("1:2:3", "is not a range"),
        ("-1:5", "is not a range"),
        ("1.5:3", "is not a range"),
        ("1e3:2e3", "is not a range"),
        (":5", "is not a range"),
        ("5:", "is not a range"),
        ("", "is not a range"),
        ("٣:٥", "is not a range"),
        ("0:" + "9" * 5000, "is not a range"),
        ("7:7", "--skip-samples 7:7 is empty"),
        ("9:7", "A must be smaller than B"),
    ],
)
def test_what_is_no_range(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_ranges(["0:1", word])


def test_counting_with_ranges() -> None:
    skipped = SkippedSamples.of(parse_ranges(["30:31", "5:9", "8:12", "12:13", "0:2"]))
    assert skipped.ranges == ((0, 2), (5, 13), (30, 31)) and str(skipped) == "0:2 5:13 30:31"
    read = [i for i in range(80) if not (i < 2 or 5 <= i < 13 or i == 30)]
    for begin in range(40):
        rest = [i for i in read if i >= begin]
        assert skipped.numbers(begin, 20) == rest[:20]
        assert skipped.after(begin, 0) == begin
        for count in range(1, 20):
            # Right behind the last one that is read: a range there is passed over later.
            assert skipped.after(begin, count) == rest[count - 1] + 1
        for end in range(begin, 40):
            assert skipped.between(begin, end) == end - begin - sum(i < end for i in rest)
    assert SkippedSamples().numbers(3, 4) == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("given", "recorded", "joined"),
    [
        ([], ["10:20", "60:70"], "10:20 60:70"),
        (["10:20"], ["10:20"], "10:20"),  # given again by a requeued job
        (["12:15"], ["10:20"], "12:15 is in it: 10:20"),
        (["48:50"], [], "48:50"),  # begins at the position
        (["65:80"], ["60:70"], "60:80"),
    ],
)
def test_ranges_are_carried_on(given: list[str], recorded: list[str], joined: str) -> None:
    ranges = join_skipped(parse_ranges(given), parse_ranges(recorded), position=48)
    assert str(ranges) == joined.split(": ")[-1]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("40:60", r"40:60 begins before sample 48, .* samples 40 to 47 were .* Skip 48:60"),
        ("10:48", r"samples 10 to 47 were already consumed\. Leave it out, or load .* sample 10"),
        ("15:25", r"samples 15 to 24 were already consumed"),  # only a part of it is recorded
    ],
)
def test_what_was_read_cannot_be_skipped(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        join_skipped(parse_ranges([word]), ((10, 20),), position=48)
