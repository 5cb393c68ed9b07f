"""`--data-path @FILE FOLDER`: weights of a mixture from a YAML file."""

from __future__ import annotations

import os

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.yaml_file import read_lines


def expand_data_path(words: tuple[str, ...], flag: str = "--data-path") -> tuple[str, ...]:
    """Replace `@FILE [FOLDER]` by `weight1 prefix1 weight2 prefix2 ...`; leave others as they are.

    Args:
        words: of the flag. FILE has lines `NAME: WEIGHT`; prefixes are FOLDER/NAME, or NAME.
        flag: for messages.

    Raises:
        ConfigError: the file cannot be read or holds no weights, or more words follow.
    """
    if not words or not words[0].startswith("@"):
        return words
    path = words[0][1:]
    if len(words) > 2:
        raise ConfigError(
            f"{flag} @{path} takes one folder, not {' '.join(words[1:])}. Write @FILE FOLDER."
        )
    content = read_lines(f"{flag} @{path}", path, "NAME: WEIGHT")
    expanded: list[str] = []
    for name, weight in content.items():
        if not isinstance(weight, str):
            raise ConfigError(
                f"{flag} @{path}: {name} (line {content.lines[name]}) must have a number as "
                "its weight."
            )
        expanded += [weight, os.path.join(*words[1:], name)]
    return tuple(expanded) if len(content) > 1 else (expanded[1],)
