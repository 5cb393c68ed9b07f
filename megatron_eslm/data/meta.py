"""`prefix.meta.json`: what preprocessing knows about a pair and its reader cannot see."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataMeta:
    """The stored facts about one `.bin/.idx` pair."""

    tokenizer: dict[str, Any]
    """`Tokenizer.describe()`."""
    documents: int
    tokens: int
    max_token_id: int
    append_eod: bool
    sources: list[str]
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    format_version: int = FORMAT_VERSION

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")


def read_meta(prefix: str) -> DataMeta | None:
    """The facts stored beside `prefix`; None where no such file lies (Megatron-LM's own tool).

    Raises:
        ConfigError: the file is there and cannot be read.
    """
    path = Path(f"{prefix}.meta.json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format version {fields['format_version']}; this version of the "
                f"package reads {FORMAT_VERSION}. Preprocess the data again."
            )
        meta = DataMeta(**fields)
        if not isinstance(meta.tokenizer["identity"], str):
            raise TypeError("tokenizer identity is not text")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is damaged ({error}). Write the data anew with tools/preprocess_data.py "
            "--overwrite, or delete this file and name the tokenizer with --tokenizer-type."
        ) from error
    return meta
