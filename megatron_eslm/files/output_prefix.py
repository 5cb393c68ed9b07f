"""`--output-prefix`: the path of several files, without their endings."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_eslm.errors import ConfigError


def output_prefix(text: str) -> Path:
    """The prefix as a path.

    Raises:
        ConfigError: it is no path, or a folder, whose files would have no name.
    """
    if not text or "\0" in text:
        raise ConfigError(f"--output-prefix {text!r} is no path; write FOLDER/NAME.")
    if text.endswith("/") or os.path.isdir(text):
        raise ConfigError(
            f"--output-prefix {text} is a folder; add the name of the files in it, as in "
            f"{text.rstrip('/')}/NAME."
        )
    return Path(text)
