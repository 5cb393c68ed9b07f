"""`prefix.meta.json`: metadata that preprocessing stores beside a pair."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json
from megatron_eslm.files.schema import STRICT, Count, Size, parse_as

FORMAT_VERSION = 1

Sha256 = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hex: a checksum, or the identity of a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class TokenizerMetadata:
    """Result of `Tokenizer.describe()`, as stored beside data and models."""

    __pydantic_config__ = STRICT
    type: str
    identity: Sha256
    vocab_size: Size
    eod: Count
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataMeta:
    """Metadata of one `.bin/.idx` pair."""

    __pydantic_config__ = STRICT
    tokenizer: dict[str, Any]
    """`Tokenizer.describe()`; `read_meta` checks that it fits TokenizerMetadata."""
    documents: Count
    tokens: Count
    max_token_id: Count
    append_eod: bool
    sources: list[str]
    bin_bytes: Count
    bin_sha256: Sha256
    idx_bytes: Count
    idx_sha256: Sha256
    document_tokens: dict[str, Count] | None = None
    """Quantiles of the documents' tokens; None in data of older versions."""
    format_version: int = FORMAT_VERSION

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")


def read_meta(prefix: str) -> DataMeta | None:
    """Read the metadata of a pair; None if there is no such file (Megatron-LM writes none).

    Raises:
        ConfigError: the file cannot be read or does not match the schema.
    """
    path = Path(f"{prefix}.meta.json")
    try:
        fields = read_json(path)
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            raise ConfigError(f"{path} has format version {version}, not {FORMAT_VERSION}.")
        meta = parse_as(DataMeta, fields, str(path))
        parse_as(TokenizerMetadata, meta.tokenizer, f"{path} (tokenizer)")
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise ConfigError(
            f"{error} Rewrite the data with tools/preprocess_data.py --overwrite, or delete "
            "this file and name the tokenizer with --tokenizer-type."
        ) from error
    return meta
