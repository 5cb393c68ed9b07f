"""Expand `--input`: patterns and lists of files become the files they name."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from megatron_eslm.data.input_files import find_files
from megatron_eslm.data.readers import FILE_ENDINGS, is_saved_dataset
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_text


def expand_inputs(words: Sequence[str]) -> list[str]:
    """Replace each pattern by the files it matches, sorted, and each `@LIST` by the lines in it.

    Args:
        words: inputs. One with `*`, `?` or `[` that is no file is a pattern, in which `**` stands
            for any folders; `@LIST` is a text file with one input a line, empty lines and those
            that begin with `#` left out.

    Raises:
        ConfigError: a pattern matches nothing, or a list cannot be read or is empty.
    """
    found: list[str] = []
    for word in words:
        if word.startswith("@") and not os.path.exists(word):
            found += [name for line in _lines(word[1:]) for name in _matches(line)]
        else:
            found += _matches(word)
    return found


def _lines(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except FileNotFoundError as error:
        raise ConfigError(f"--input @{path}: there is no file {path}.") from error
    except ConfigError as error:
        raise ConfigError(f"--input @{path}: {error}") from error
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise ConfigError(f"--input @{path}: the list names no input; write one a line.")
    return named


def _matches(word: str) -> list[str]:
    if not glob.has_magic(word) or os.path.exists(word):
        return [word]
    names = sorted(glob.glob(os.path.expanduser(word), recursive=True))
    if not names:
        raise ConfigError(f"--input {word!r} matches no file.")
    return names


def input_files(words: Sequence[str]) -> list[Path]:
    """The files that inputs name, in order: patterns, lists and folders expanded.

    Raises:
        ConfigError: as `expand_inputs` and `find_files`; an input is missing or not a file or
            folder; or a file is named twice.
    """
    files: list[Path] = []
    for name in expand_inputs(words):
        path = Path(name).expanduser()
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--input {name} cannot be read ({error}). With --split-key or --of "
                "inputs are files and folders; standard input and data sets of the hub cannot be "
                "divided."
            ) from error
        if stat.S_ISDIR(mode):
            if is_saved_dataset(path):
                raise ConfigError(
                    f"--input {name} was written by datasets.save_to_disk and cannot be divided. "
                    "Export it with to_parquet, or leave out --split-key and --of."
                )
            files += find_files(path, FILE_ENDINGS)
        else:
            files.append(path)
    if not files:
        raise ConfigError("No input given; name at least one file or folder.")
    seen: dict[str, Path] = {}
    for path in files:
        real = os.path.realpath(path)
        if real in seen:
            raise ConfigError(f"--input names {path} twice (also as {seen[real]}).")
        seen[real] = path
    return files
