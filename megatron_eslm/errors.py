"""The exceptions that a command line prints in one paragraph, and hints for their texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Bad input: a flag, file, shape, layout or checkpoint that cannot be used.

    The message is one paragraph that names the flag or file, says what is wrong and what to do.
    Command lines print it without a traceback and exit with code 2.
    """


class Failure(Exception):
    """What a command was asked for did not come about, though the input can be used.

    Command lines print the message without a traceback and exit with code 1.
    """


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough to be quoted within a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean X?` with the known word that is most like `word`; empty if none is.

    Args:
        word: as it was given.
        known: what there is.
        cutoff: how alike the two must be, from 0 to 1.
    """
    by_form = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(word.casefold(), by_form, n=1, cutoff=cutoff)
    return f" Did you mean {by_form[near[0]]}?" if near else ""
