"""Names on the Hugging Face hub: told from mistyped paths, and fetched into the hub's cache."""

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
_ANSWER_SECONDS = 3.0  # tried twice by the library


def is_hub_name(name: str) -> bool:
    """Whether this can be meant for the hub: `gpt2` or `openai-community/gpt2`, and no path.

    Paths are what exists, what lies in a folder that exists, what begins with `.`, `/` or `~`, and
    what ends like a file.
    """
    path = Path(name)
    if not _NAME.fullmatch(name) or path.suffix in _FILE_SUFFIXES or path.exists():
        return False
    return "/" not in name or not path.parent.exists()


def model_folder(flag: str, name: str, files: Sequence[str]) -> Path:
    """What `name` stands for: a local path, or a model on the hub, whose files are fetched.

    Args:
        flag: that gives the name, for messages.
        name: a path, or a name on the hub.
        files: the files to fetch; `*` stands for anything.

    Returns:
        The path itself (there or not) unless `is_hub_name`; else the folder in the hub's cache.

    Raises:
        ConfigError: the hub knows no such model, or neither hub nor cache can give it.
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
    logger.info("%s %s: no path here; the Hugging Face model of that name is used", flag, name)
    return Path(folder)


def check_data_set(flag: str, name: str) -> None:
    """Ask the hub for a data set, once and for a few seconds, before a library asks many times.

    Raises:
        ConfigError: the hub knows no such data set, or cannot be reached.
    """
    if trouble := _ask(flag, name, "dataset"):
        raise _unreachable(flag, name, "data set", trouble)


def _ask(flag: str, name: str, kind: str) -> str:
    """Why the hub cannot be reached; "" if it has a repository of that name, ConfigError if not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_ANSWER_SECONDS)
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{flag} {name} is no path here, and the Hugging Face hub has no {kind} of that name "
            "(or none that you may see; then log in to the hub). Correct the path or the name."
        ) from error
    except Exception as error:  # HF_HUB_OFFLINE, sockets, proxies, a hub that is down
        return first_line(error)
    return ""


def _unreachable(flag: str, name: str, what: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{flag} {name} is no path here, and as a {what} of the Hugging Face hub it cannot be "
        f"fetched ({reason}). Correct the path, or fetch the {what} where there is a network and "
        "name its folder."
    )
