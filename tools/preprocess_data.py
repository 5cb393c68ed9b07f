"""Turn text into Megatron .bin/.idx files.

    python tools/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt \\
        --workers 8 --append-eod
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import get_args

from megatron_eslm.command_line import Parser, command
from megatron_eslm.data.bad_lines import OnBadLine
from megatron_eslm.data.options import TokenizerType
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import build_tokenizer
from megatron_eslm.files.stopped import stopped_by_signals


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="INPUT",
        help=".jsonl/.json (also .gz, .bz2, .xz, .zst), .parquet or .txt files (a .txt file is one "
        "document), folders of those, - for JSON lines from standard input, folders of Hugging "
        "Face datasets, or data set names as NAME[:CONFIG[:SPLIT]]")  # fmt: skip
    add("--output-prefix", required=True, help="path of the output without ending")
    add("--tokenizer-type", required=True, choices=get_args(TokenizerType))
    add("--vocab-file", help="GPT2BPETokenizer: vocab.json")
    add("--merge-file", help="GPT2BPETokenizer: merges.txt")
    add("--tokenizer-model", help="SentencePieceTokenizer: the .model file; HuggingFaceTokenizer: "
        "a tokenizer.json, a folder with one, or the name of a model on the hub")  # fmt: skip
    add("--workers", type=int, default=1, help="processes that tokenize")
    add("--append-eod", action="store_true", help="end each document with the end-of-document id")
    add("--text-key", "--json-keys", default="text", help="field or column that holds the text")
    add("--on-bad-line", choices=get_args(OnBadLine), default="fail", help="end the run at a "
        "document that cannot be read, or leave it out and count it (%(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing output")
    add("--log-interval", type=float, default=10.0, help="seconds between progress lines")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
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
