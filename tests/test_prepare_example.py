"""examples/data/prepare_with_datatrove.py on a small corpus; needs the extra `prepare`."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eslm.data.readers import read_documents

SCRIPT = Path(__file__).parents[1] / "examples" / "data" / "prepare_with_datatrove.py"
VOCABULARY = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "su") for b in ("ra", "ten", "dop", "vi")]


def prose(seed: int, words: int = 120) -> str:
    rng = random.Random(seed)
    return "the end of " + " ".join(rng.choices([*VOCABULARY, "the", "and", "to"], k=words))


@pytest.mark.slow
def test_each_step_drops_what_it_should(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    question = prose(1000, 20)
    kept = [prose(seed) for seed in range(30)]
    bad = {
        "quality": ["# # # 1 2 3 " * 30, "too short"],
        "near-duplicates": [f"{kept[3]} once more"],
        "tasks": [f"{prose(50)} {question} {prose(51)}"],
    }
    corpus, tasks = tmp_path / "in" / "deep", tmp_path / "tasks" / "piqa"
    corpus.mkdir(parents=True)
    tasks.mkdir(parents=True)
    (tasks / "validation.jsonl").write_text(json.dumps({"goal": question, "label": 0}) + "\n")
    texts = [*kept, *bad["quality"], *bad["near-duplicates"], *bad["tasks"]]
    lines = [json.dumps({"text": text, "meta": {"n": n}}) + "\n" for n, text in enumerate(texts)]
    (corpus / "a.jsonl").write_text("".join(lines[1::2]))
    with gzip.open(corpus / "b.jsonl.gz", "wt") as file:
        file.writelines(lines[::2])
    (corpus / "github.jsonl").write_text(json.dumps({"text": bad["quality"][0], "meta": {}}) + "\n")

    path = [str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH")]

    def run(out: str = "out", *more: str) -> subprocess.CompletedProcess[str]:
        words = [
            "--input",
            str(tmp_path / "in"),
            "--output",
            str(tmp_path / out),
            "--tasks",
            "piqa",
        ]
        return subprocess.run(
            [sys.executable, str(SCRIPT), *words, "--workers", "2", *more],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("out", "--task-data", str(tmp_path / "tasks"), "--keep", "deep-github")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| quality | 35 | 2 |" in done.stdout and "| tasks | 32 | 1 |" in done.stdout
    assert "| near-duplicates | 33 | 1 |" in done.stdout
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.jsonl")) == [
        "deep-a.jsonl", "deep-b.jsonl", "deep-github.jsonl"
    ]  # fmt: skip
    left = list(read_documents(sorted(map(str, out.glob("*.jsonl")))))
    assert set(left) - {kept[3], f"{kept[3]} once more"} == {*kept, bad["quality"][0]} - {kept[3]}
    assert len(left) == 31
    fields = [json.loads(line) for line in (out / "deep-a.jsonl").read_text().splitlines()]
    assert all(line == {"text": texts[line["meta"]["n"]], "meta": line["meta"]} for line in fields)
    for name, dropped in bad.items():
        found = list(read_documents([str(out / "dropped" / name)]))
        assert len(found) == len(dropped), name
    again = run("out", "--task-data", str(tmp_path / "tasks"), "--keep", "deep-github")
    assert again.stdout.count("| 35 | 2 |") == 1  # nothing is done again
    assert "no task has documents here" in run("none", "--tasks", "no_such_task").stderr
