#!/usr/bin/env python
"""Train a byte-level BPE tokenizer on text, for models too small for GPT-2's vocabulary.

    python tools/train_tokenizer.py --input corpus/train --vocab-size 8192 --output data/bpe.json

Then preprocess with --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/bpe.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_eslm.command_line import Parser, command
from megatron_eslm.data.bad_lines import BadLines, OnBadLine
from megatron_eslm.data.readers import read_documents
from megatron_eslm.data.tokenizers.train_bpe import train_bpe
from megatron_eslm.errors import ConfigError


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 if the input cannot be used."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="as tools/preprocess_data.py takes it")
    add("--vocab-size", type=int, required=True, help="with the 256 bytes and <|endoftext|>")
    add("--output", required=True, metavar="FILE.json")
    add("--text-key", default="text", help="field or column that holds the text (%(default)s)")
    add("--on-bad-line", choices=get_args(OnBadLine), default="fail", help="end at a document that "
        "cannot be read, or leave it out and count it (%(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    output = Path(args.output)
    try:
        _check_output(args.output, args.overwrite, args.input)
        bad = BadLines(args.on_bad_line)
        ids = train_bpe(read_documents(args.input, args.text_key, bad), args.vocab_size, output)
    except OSError as error:
        print(f"error: --output {output} cannot be written: {error}", file=sys.stderr)
        return 2
    few = f", for the text has no more pairs to merge (--vocab-size {args.vocab_size})"
    print(f"wrote {output}: {ids} ids{few if ids < args.vocab_size else ''}")
    if bad.count:
        print(f"left out {bad.count} document(s) that cannot be read; the first: {bad.first}")
    return 0


def _check_output(text: str, overwrite: bool, inputs: Sequence[str]) -> None:
    """Find out before the training what would fail behind it."""
    output = Path(text)
    if output.resolve() in [Path(name).resolve() for name in inputs]:
        raise ConfigError(f"--output {output} is the --input, which it would replace.")
    if text.endswith("/") or output.is_dir() or (output.exists() and not output.is_file()):
        raise ConfigError(f"--output {output} is not a file; name a file, as in bpe.json.")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output} exists; choose another or give --overwrite.")
    output.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output.parent).close()


if __name__ == "__main__":
    sys.exit(main())
