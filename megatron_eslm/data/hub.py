"""Hugging Face hub names: distinguish them from mistyped paths, and download them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_eslm.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

_WORD = r"[A-Za-z0-9]+([._-]+[A-Za-z0-9]+)*"
_NAME = re.compile(f"({_WORD}/)?{_WORD}")
_FILE_SUFFIXES = {
    ".json",
    ".jsonl",
    ".gz",
    ".zst",
    ".parquet",
    ".txt",
    ".csv",
    ".model",
    ".bin",
    ".bz2",
    ".xz",
}
_ANSWER_SECONDS = 3.0  # per attempt; the library tries twice


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a hub name, such as `gpt2` or `openai-community/gpt2`.

    It is a path if it exists, if its parent folder exists, if it begins with `.`, `/` or `~`, or if
    it has a file suffix.
    """
    path = Path(name)
    if not _NAME.fullmatch(name) or path.suffix in _FILE_SUFFIXES or path.exists():
        return False
    return "/" not in name or not path.parent.exists()


def model_folder(flag: str, name: str, files: Sequence[str]) -> Path:
    """Resolve `name` to a local folder, downloading it from the hub if necessary.

    Args:
        flag: the flag that gives the name, for messages.
        name: a path or a hub name.
        files: patterns of the files to download.

    Returns:
        The folder in the hub's cache if `is_hub_name`; otherwise the path, existing or not.

    Raises:
        ConfigError: the hub has no such model, or neither hub nor cache can provide it.
    """
    if not is_hub_name(name):
        return Path(name)
    import huggingface_hub

    trouble = _ask(flag, name, "model")
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(files), local_files_only=bool(trouble)
        )
    except Exception as error:  # sockets, files that are not in the cache, a full disk
        raise _unreachable(flag, name, "model", trouble or first_line(error)) from error
    logger.info("%s %s: not a local path; using the Hugging Face model of that name", flag, name)
    return Path(folder)


def check_data_set(flag: str, name: str) -> None:
    """Check with a short timeout that the hub has a data set; `datasets` would retry many times.

    Raises:
        ConfigError: the hub has no such data set, or cannot be reached.
    """
    if trouble := _ask(flag, name, "dataset"):
        raise _unreachable(flag, name, "data set", trouble)


def _ask(flag: str, name: str, kind: str) -> str:
    """Return why the hub cannot be reached, "" if it has the repository; ConfigError if not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_ANSWER_SECONDS)
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{flag} {name} is not a local path, and the Hugging Face hub has no {kind} of that "
            "name that you can access (private ones need a login). Correct the path or the name."
        ) from error
    except Exception as error:  # HF_HUB_OFFLINE, sockets, proxies, a hub that is down
        return first_line(error)
    return ""


def _unreachable(flag: str, name: str, what: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{flag} {name} is not a local path, and the {what} of that name cannot be downloaded from "
        f"the Hugging Face hub ({reason}). Correct the path, or download the {what} on a machine "
        "with network access and name its folder."
    )
