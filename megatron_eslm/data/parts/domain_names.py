"""From the values of `--split-key` to the names of domains, which name files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_eslm.errors import ConfigError, did_you_mean
from megatron_eslm.files.yaml_file import read_lines

SLIMPAJAMA = {
    "RedPajamaArXiv": "arxiv",
    "RedPajamaBook": "book",
    "RedPajamaC4": "c4",
    "RedPajamaCommonCrawl": "commoncrawl",
    "RedPajamaGithub": "github",
    "RedPajamaStackExchange": "stackexchange",
    "RedPajamaWikipedia": "wikipedia",
}
"""`meta.redpajama_set_name` of SlimPajama."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class DomainNames:
    """Names of domains by value."""

    names: Mapping[str, str]
    complete: bool
    """Whether other values are refused; otherwise they name their domains themselves."""

    def of(self, value: str, where: str) -> str:
        """The domain of a value.

        Raises:
            ConfigError: the value has no name, or cannot name a file.
        """
        if value in self.names:
            return self.names[value]
        if self.complete:
            raise ConfigError(
                f"{where}: the domain {value!r} is not in --domain-names (it has "
                f"{', '.join(self.names)}).{did_you_mean(value, self.names)} Add it there."
            )
        if not _PLAIN.fullmatch(value):
            raise ConfigError(
                f"{where}: the domain {value!r} cannot be the name of a file. Give it one with "
                "--domain-names FILE, a YAML file of lines VALUE: NAME."
            )
        return value


def domain_names(path: str | None) -> DomainNames:
    """Read a YAML file of lines `VALUE: NAME`; without one, SlimPajama's names.

    Raises:
        ConfigError: the file cannot be read, or a name cannot be one of a file.
    """
    if path is None:
        return DomainNames(names=SLIMPAJAMA, complete=False)
    content = read_lines(f"--domain-names {path}", path, "VALUE: NAME")
    names: dict[str, str] = {}
    for value, name in content.items():
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise ConfigError(
                f"--domain-names {path}: {name!r} (line {content.lines[value]}) names files; use "
                "letters, digits, '.', '-', '_'."
            )
        names[value] = name
    return DomainNames(names=names, complete=True)
