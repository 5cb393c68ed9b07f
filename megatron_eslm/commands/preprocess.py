"""Turn text into Megatron .bin/.idx files.

    megatron-eslm preprocess --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt \\
        --workers 8 --append-eod

docs/data.md says what is read and what is written.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.data.bad_lines import OnBadLine
from megatron_eslm.data.data_options import TokenizerType
from megatron_eslm.limits import Flag


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to read, how to tokenize it and where to write."""

    input: Annotated[tuple[str, ...], Flag(metavar="INPUT")]
    """.jsonl/.json (also .gz, .bz2, .xz, .zst), .parquet or .txt files (a .txt file is one
    document), folders of those, - for JSON lines from standard input, folders of Hugging Face
    datasets, or data set names as NAME[:CONFIG[:SPLIT]]"""

    output_prefix: Annotated[str, Flag(metavar="PREFIX")]
    """Path of the output without ending."""

    tokenizer_type: TokenizerType
    """Which tokenizer."""

    vocab_file: Annotated[str, Flag(metavar="FILE")] | None = None
    """GPT2BPETokenizer: vocab.json."""

    merge_file: Annotated[str, Flag(metavar="FILE")] | None = None
    """GPT2BPETokenizer: merges.txt."""

    tokenizer_model: Annotated[str, Flag(metavar="FILE")] | None = None
    """SentencePieceTokenizer: the .model file; HuggingFaceTokenizer: a tokenizer.json, a folder
    with one, or the name of a model on the hub."""

    workers: int = 1
    """Processes that tokenize."""

    append_eod: bool = False
    """End each document with the end-of-document id."""

    text_key: Annotated[str, Flag(metavar="KEY", also="--json-keys")] = "text"
    """Field or column that holds the text."""

    on_bad_line: OnBadLine = "fail"
    """End the run at a document that cannot be read, or leave it out and count it."""

    overwrite: bool = False
    """Replace existing output."""

    log_interval: float = 10.0
    """Seconds between progress lines."""


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(PreprocessOptions, argv, __doc__)
    from megatron_eslm.data.preprocess import preprocess
    from megatron_eslm.data.tokenizers.build import build_tokenizer
    from megatron_eslm.files.stopped import stopped_by_signals

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with stopped_by_signals():
        tokenizer = build_tokenizer(
            options.tokenizer_type,
            options.vocab_file,
            options.merge_file,
            options.tokenizer_model,
        )
        preprocess(
            options.input,
            options.output_prefix,
            tokenizer,
            workers=options.workers,
            append_eod=options.append_eod,
            text_key=options.text_key,
            on_bad_line=options.on_bad_line,
            overwrite=options.overwrite,
            log_interval_seconds=options.log_interval,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
