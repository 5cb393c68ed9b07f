"""--eval-tasks: on the live weights, what tools/evaluate.py says of the checkpoint of that step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from megatron_eslm.commands import evaluate

from ..evaluation.conftest import write_tasks
from ..harness import run_ranks
from .runs import ROWS, read_metrics, train, words

TASKS = ("animals", "last_word", "continued", "texts")
FLAGS = ("--global-batch-size", 2 * ROWS, "--save-interval", 2, "--keep-last", 0)
LAYOUTS = {
    "one": (1, ()),
    "zero3": (2, ("--zero-stage", 3, "--architecture", "llama")),
    "3d": (
        4,
        (
            *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
            *("--zero-stage", 1, "--num-layers", 4, "--eslm-scope", "step", "--eslm-alpha", 0.3),
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_live_weights_are_those_of_the_checkpoint(
    layout: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ranks, flags = LAYOUTS[layout]
    tasks, metrics = write_tasks(tmp_path / "tasks"), tmp_path / "run.jsonl"
    argv = words(
        *(data, *FLAGS, *flags, "--save", tmp_path / "run", "--tensorboard-dir", tmp_path / "tb"),
        *("--eval-tasks", *TASKS, "--eval-tasks-path", tasks, "--eval-tasks-interval", 2),
        iters=3,
    )
    run_ranks(ranks, lambda rank: train(argv, metrics) and None)
    lines = {
        line["iteration"]: {key: value for key, value in line.items() if key[:6] == "tasks/"}
        for line in read_metrics(metrics)
    }
    assert [n for n, line in lines.items() if line] == [2, 3]
    assert list((tmp_path / "tb").glob("**/events.*"))
    output = tmp_path / "results.jsonl"
    asked = ["--load", str(tmp_path / "run"), "--all-checkpoints", "--output", str(output)]
    assert evaluate.main([*asked, "--include-path", str(tasks)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted({line["iteration"] for line in found}) == [2, 3]
    for line in found:
        for name, value in line["metrics"].items():
            live = lines[line["iteration"]][f"tasks/{line['task']}/{name}"]
            assert live == pytest.approx(value, rel=1e-5), (line["task"], name)
    assert "mean of" in capsys.readouterr().out
