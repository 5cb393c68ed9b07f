r"""Preprocessing against raw tiktoken on the same texts and cores.

    python -m benchmarks.preprocessing --input corpus/train --vocab-file vocab.json \
        --merge-file merges.txt

Ours: jsonl.zst in, .bin and .idx out, GPT-2's BPE, `--workers` processes. The peer: texts already
in memory, encode_ordinary_batch with as many threads, nothing written.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

import zstandard

from benchmarks.interleave import interleaved, report
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.readers import read_documents
from megatron_eslm.data.tokenizers.build import build_tokenizer
from megatron_eslm.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--vocab-file", required=True)
    parser.add_argument("--merge-file", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    try:
        tokenizer = build_tokenizer("GPT2BPETokenizer", args.vocab_file, args.merge_file, None)
        texts = list(read_documents(args.input))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "all.jsonl.zst")
        with source.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as raw:
            lines = io.TextIOWrapper(raw, encoding="utf-8")
            for text in texts:
                lines.write(json.dumps({"text": text}) + "\n")
            lines.flush()

        def ours() -> None:
            preprocess(
                [str(source)],
                str(Path(folder, "out")),
                tokenizer,
                workers=args.workers,
                append_eod=True,
                overwrite=True,
            )

        def peer() -> None:
            tokenizer._encoding.encode_ordinary_batch(texts, num_threads=args.workers)

        timings = interleaved({"ours": ours, "peer": peer}, args.repetitions)
    # Megabytes a second of ours over the peer's.
    report(
        "preprocessing MB/s / raw tiktoken",
        timings.ratio("peer", "ours"),
        ">= 0.80",
        spread=timings.ratios("peer", "ours"),
        our_mb_per_s=round(megabytes / timings.median("ours"), 2),
        peer_mb_per_s=round(megabytes / timings.median("peer"), 2),
        megabytes=round(megabytes, 1),
        workers=args.workers,
        repetitions=args.repetitions,
    )


if __name__ == "__main__":
    main()
