"""Check Megatron .bin/.idx files from end to end.

    megatron-eslm verify-data data/books data/web
    megatron-eslm verify-data data/slimpajama

Reads every byte, and compares it with the checksum in PREFIX.meta.json where there is one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import Flag


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to check."""

    prefix: Annotated[tuple[str, ...], Flag(positional=True)]
    """Path of a pair without its ending, or a folder of pairs."""


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if a pair is damaged."""
    options = parse_options(VerifyOptions, argv, __doc__)
    from megatron_eslm.data.verify import verify_data

    damaged = 0
    for prefix in _pairs(options.prefix):
        try:
            data = verify_data(prefix)
        except ConfigError as error:
            damaged += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        print(f"{prefix}: {data.documents} documents, {data.tokens} tokens, {data.dtype}")
        if data.tokenizer is None:
            print(f"  tokenizer unknown: no {prefix}.meta.json; ids and checksum not compared")
        else:
            tokenizer = data.tokenizer
            print(f"  {tokenizer.name} {tokenizer.identity[:12]}, {tokenizer.vocab_size} ids")
            print(f"  begins: {data.sample!r}")
        if data.document_tokens:
            lengths = ", ".join(f"{name} {n}" for name, n in data.document_tokens.items())
            print(f"  tokens of a document: {lengths}")
        if data.losses:
            print(f"  reference losses: {', '.join(data.losses)}")
    return 2 if damaged else 0


def _pairs(words: Sequence[str]) -> Iterator[str]:
    """Replace a folder by the pairs in it, sorted."""
    for word in words:
        inside = sorted(Path(word).glob("*.idx")) if os.path.isdir(word) else []
        yield from (str(idx.with_suffix("")) for idx in inside)
        if not inside:
            yield word


if __name__ == "__main__":
    sys.exit(main())
