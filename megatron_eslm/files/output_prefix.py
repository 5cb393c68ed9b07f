"""`--output-prefix`: common path of several files, without their suffixes."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_eslm.errors import ConfigError


def output_prefix(text: str) -> Path:
    """Check an output prefix and return it as a path.

    Raises:
        ConfigError: it is not a path, or it is a folder, so that the files would have no name.
    """
    if not text or "\0" in text:
        raise ConfigError(f"--output-prefix {text!r} is not a path; write FOLDER/NAME.")
    if text.endswith("/") or os.path.isdir(text):
        raise ConfigError(
            f"--output-prefix {text} is a folder; add the name of the files in it, as in "
            f"{text.rstrip('/')}/NAME."
        )
    return Path(text)
