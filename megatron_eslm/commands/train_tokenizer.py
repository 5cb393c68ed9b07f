"""Train a byte-level BPE tokenizer on text, for models too small for GPT-2's vocabulary.

    megatron-eslm train-tokenizer --input corpus/train --vocab-size 8192 --output data/bpe.json

Then preprocess with --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/bpe.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.data.bad_lines import BadLines, OnBadLine
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import Flag


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerOptions:
    """What to train on and what to write."""

    input: Annotated[tuple[str, ...], Flag(metavar="INPUT")]
    """As preprocess takes it."""

    vocab_size: int
    """With the 256 bytes and <|endoftext|>."""

    output: Annotated[str, Flag(metavar="FILE.json")]
    """File to write."""

    text_key: Annotated[str, Flag(metavar="KEY")] = "text"
    """Field or column that holds the text."""

    on_bad_line: OnBadLine = "fail"
    """End at a document that cannot be read, or leave it out and count it."""

    overwrite: bool = False
    """Replace an existing file."""


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(TrainTokenizerOptions, argv, __doc__)
    from megatron_eslm.data.readers import read_documents
    from megatron_eslm.data.tokenizers.train_bpe import train_bpe

    output, size = Path(options.output), options.vocab_size
    try:
        _check_output(options)
        bad = BadLines(options.on_bad_line)
        ids = train_bpe(read_documents(options.input, options.text_key, bad), size, output)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error}.") from error
    few = f", for the text has no more pairs to merge (--vocab-size {size})"
    print(f"wrote {output}: {ids} ids{few if ids < size else ''}")
    if bad.count:
        print(f"left out {bad.count} document(s) that cannot be read; the first: {bad.first}")
    return 0


def _check_output(options: TrainTokenizerOptions) -> None:
    """Find out before the training what would fail behind it."""
    text, output = options.output, Path(options.output)
    if output.resolve() in [Path(name).resolve() for name in options.input]:
        raise ConfigError(f"--output {output} is the --input, which it would replace.")
    if text.endswith("/") or output.is_dir() or (output.exists() and not output.is_file()):
        raise ConfigError(f"--output {output} is not a file; name a file, as in bpe.json.")
    if output.exists() and not options.overwrite:
        raise ConfigError(f"--output {output} exists; choose another or give --overwrite.")
    output.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output.parent).close()


if __name__ == "__main__":
    sys.exit(main())
