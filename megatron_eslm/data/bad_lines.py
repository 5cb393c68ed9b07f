"""Policy for unreadable documents: raise an error, or skip and count them."""

from __future__ import annotations

import logging
from typing import Literal

from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

OnBadLine = Literal["fail", "skip"]

_MOST_LOGGED = 5


class BadLines:
    """Handles every error about a single input document (a line, a row, a `.txt` file)."""

    def __init__(self, policy: OnBadLine = "fail") -> None:
        """Args:
        policy: `fail` raises the first error, `skip` counts them and logs the first few.
        """
        self.policy = policy
        self.count = 0
        self.first = ""
        """Message of the first error."""

    def found(self, error: ConfigError) -> None:
        """Raise `error` or count it.

        Raises:
            ConfigError: the error, if the policy is `fail`.
        """
        if self.policy == "fail":
            raise ConfigError(
                f"{error} With --on-bad-line skip, tools/preprocess_data.py and "
                "tools/train_tokenizer.py leave such documents out and count them."
            ) from error
        self.count += 1
        self.first = self.first or str(error)
        if self.count <= _MOST_LOGGED:
            more = " (others are only counted)" if self.count == _MOST_LOGGED else ""
            logger.warning("left out: %s%s", error, more)


_NAMES: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "a list",
}


def text_of(value: object, text_key: str, where: str) -> str:
    """Return `value` if it is text.

    Args:
        value: content of the field.
        text_key: name of the field.
        where: file and line or row, for messages.

    Raises:
        ConfigError: it is not text.
    """
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: field {text_key!r} holds {_NAMES.get(type(value), type(value).__name__)}, "
            "not text. Name another field with --text-key or fix the input."
        )
    return value
