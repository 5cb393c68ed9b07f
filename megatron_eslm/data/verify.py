"""Verify a `.bin/.idx` pair in full against its metadata."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_eslm.data.contents import check_ends, check_ids, check_meta, check_sum
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.length_quantiles import length_quantiles
from megatron_eslm.data.meta import read_meta
from megatron_eslm.data.reference_losses import verify_losses
from megatron_eslm.data.tokenizers.build import Tokenizer, load_tokenizer
from megatron_eslm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VerifiedData:
    """A pair that has passed all checks."""

    prefix: str
    documents: int
    tokens: int
    dtype: str
    tokenizer: Tokenizer | None
    """None for a pair without metadata, whose ids and checksums cannot be verified."""
    sample: str
    """First 200 characters of the text."""
    document_tokens: dict[str, int] | None
    """Quantiles of the documents' tokens, where they are stored; verified."""
    losses: tuple[str, ...]
    """Names of the complete reference losses beside the pair, also verified."""


def verify_data(prefix: str) -> VerifiedData:
    """Check sizes, offsets, boundaries, checksums, ids and ends of documents of one pair.

    Raises:
        ConfigError: names the first problem found.
    """
    index, meta = read_index(prefix), read_meta(prefix)
    tokenizer, sample = None, ""
    if meta is not None:
        check_meta(index, meta)
        check_sum(prefix, ".idx", meta.idx_sha256)
        check_sum(prefix, ".bin", meta.bin_sha256)
        tokenizer = load_tokenizer(f"{prefix}.tokenizer")
        if tokenizer.identity != meta.tokenizer["identity"]:
            raise ConfigError(
                f"{prefix}.tokenizer is not the tokenizer with which the data was made; put the "
                "original folder back."
            )
        largest = check_ids(index, tokenizer)
        if largest != meta.max_token_id:
            raise ConfigError(
                f"{prefix}.meta.json says that the largest id is {meta.max_token_id}, but it is "
                f"{largest}. The file was changed; copy it again or preprocess with --overwrite."
            )
        check_ends(index, meta, tokenizer.eod, every=True)
        if meta.document_tokens not in (None, length_quantiles(index.lengths)):
            raise ConfigError(
                f"{prefix}.meta.json says that documents have {meta.document_tokens} tokens, but "
                f"they have {length_quantiles(index.lengths)}. Preprocess with --overwrite."
            )
        sample = tokenizer.decode(index.ids()[:1000].tolist())[:200]
    return VerifiedData(
        prefix=prefix,
        documents=index.documents,
        tokens=index.tokens,
        dtype=np.dtype(index.dtype).name,
        tokenizer=tokenizer,
        sample=sample,
        document_tokens=None if meta is None else meta.document_tokens,
        losses=tuple(verify_losses(index)),
    )
