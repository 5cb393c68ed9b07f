r"""Preprocessing against raw tiktoken on the same texts and cores, and against reading alone.

    python -m benchmarks.preprocessing --input corpus/train --vocab-file vocab.json \
        --merge-file merges.txt

Ours: jsonl.zst in, .bin and .idx out, GPT-2's BPE, `--workers` processes; one file, and as many
files as `--parts` in parts. The peer: texts already in memory, encode_ordinary_batch with as many
threads, nothing written. Reading alone: decompression and JSON of the one file, in this process.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import zstandard

from benchmarks.interleave import interleaved, report
from megatron_eslm.data.parts.preprocess import preprocess_in_parts
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
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    try:
        tokenizer = build_tokenizer("GPT2BPETokenizer", args.vocab_file, args.merge_file, None)
        texts = list(read_documents(args.input))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        whole = _write(Path(folder, "all.jsonl.zst"), texts)
        parts = [
            _write(Path(folder, f"{n}.jsonl.zst"), texts[n :: args.parts])
            for n in range(args.parts)
        ]
        to = {"tokenizer": tokenizer, "append_eod": True, "overwrite": True}

        def read() -> None:
            for _ in read_documents([whole]):
                pass

        cases: dict[str, Callable[[], object]] = {"reading": read}
        for n in args.workers:
            cases[f"ours {n}"] = partial(
                preprocess, [whole], str(Path(folder, "out")), workers=n, **to
            )
            cases[f"parts {n}"] = partial(
                preprocess_in_parts, parts, str(Path(folder, "joined")), workers=n, **to
            )
            cases[f"peer {n}"] = partial(
                tokenizer._encoding.encode_ordinary_batch, texts, num_threads=n
            )
        timings = interleaved(cases, args.repetitions)
    rates = {
        f"{name.replace(' ', '_')}_mb_per_s": round(megabytes / timings.median(name), 2)
        for name in timings.seconds
    }
    settings = {"megabytes": round(megabytes, 1), "repetitions": args.repetitions}

    def line(row: str, ours: str, other: str, target: str, **more: object) -> None:
        """Megabytes a second of one over those of the other."""
        ratios = timings.ratios(other, ours)
        report(row, timings.ratio(other, ours), target, spread=ratios, **settings, **more)

    for n in args.workers:
        line(f"preprocessing MB/s / raw tiktoken, {n} workers", f"ours {n}", f"peer {n}", ">= 0.80")
        line(f"the same in {args.parts} parts, {n} workers", f"parts {n}", f"peer {n}", ">= 0.80")
        line(f"preprocessing MB/s / reading alone, {n} workers", f"ours {n}", "reading", "")
    most, least = args.workers[-1], args.workers[0]
    line(
        f"preprocessing MB/s, {most} workers / {least}",
        f"ours {most}",
        f"ours {least}",
        "",
        **rates,
    )


def _write(path: Path, texts: Sequence[str]) -> str:
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8")
        for text in texts:
            lines.write(json.dumps({"text": text}) + "\n")
        lines.flush()
    return str(path)


if __name__ == "__main__":
    main()
