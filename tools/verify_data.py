"""Check Megatron .bin/.idx files from end to end: python tools/verify_data.py PREFIX..."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_eslm.command_line import Parser, command
from megatron_eslm.data.verify import verify_data
from megatron_eslm.errors import ConfigError


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("prefix", nargs="+", help="path of a pair without its ending")
    damaged = 0
    for prefix in parser.parse_args(argv).prefix:
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
        if data.losses:
            print(f"  reference losses: {', '.join(data.losses)}")
    return 2 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
