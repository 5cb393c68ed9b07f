"""Results of tools/evaluate.py, joined to the runs whose checkpoints were evaluated."""

from __future__ import annotations

import pytest

from megatron_eslm.commands import compare_runs
from megatron_eslm.errors import ConfigError
from megatron_eslm.evaluation.report import ModelResult
from megatron_eslm.evaluation.run import TaskResult
from megatron_eslm.reports.groups import Group, group_runs
from megatron_eslm.reports.panels import accuracy_panel
from megatron_eslm.reports.runs import read_run
from megatron_eslm.reports.task_results import read_task_results, with_task_results
from megatron_eslm.reports.task_table import task_tables

from .conftest import line, totals


def result(load, iteration, task="piqa", *, limit=None, **metrics):
    """A line as tools/evaluate.py writes it."""
    found = TaskResult(
        task=task,
        version="lm-eval 0.4.13, task 1.0",
        shots=5,
        split="validation",
        documents=100,
        data="data",
        metrics=metrics,
        stderr={},
        seconds=1.0,
    )
    return ModelResult(
        load=str(load), iteration=iteration, dtype="float32", limit=limit, result=found
    ).line()


@pytest.fixture
def run_at(metrics_file, tmp_path):
    """A run that saved in a folder of its name; 4e11 FLOPs at its end, iteration 200."""

    def make(name, **more):
        head = {"run": {"seed": 1, "selection": name, "save": str(tmp_path / name)}}
        lines = [line(i, 5 - i / 100, **totals(1, i, 1), **more) for i in (100, 200)]
        return read_run(metrics_file(f"{name}.jsonl", head, *lines))

    return make


def test_groups_repeat_their_tasks_and_are_left_out(metrics_file):
    group = {**result("clm", 50, "both", acc=0.3), "members": ["piqa", "copa"]}
    found = read_task_results([metrics_file("r.jsonl", result("clm", 50, acc=0.5), group)])
    assert [line.task for _, line in found] == ["piqa"]


def test_results_join_their_run_by_folder_and_iteration(
    run_at, metrics_file, tmp_path, monkeypatch
):
    clm, eslm = run_at("clm"), run_at("eslm")
    monkeypatch.chdir(tmp_path)
    first = metrics_file(
        "one.jsonl",
        result("clm/", 50, acc=0.5, acc_norm=0.4, bits_per_byte=1.0),
        result("clm", 200, acc=0.6, acc_norm=0.1),
        result("clm", 200, acc=0.6, acc_norm=0.8),  # evaluated once more
        result("clm", 50, "copa", acc=0.2),
    )
    second = metrics_file("two.jsonl", result(tmp_path / "eslm", 150, acc=0.1, acc_norm=0.3))
    found = with_task_results([clm, eslm], read_task_results([first, second]))
    assert [run.records for run in found] == [clm.records, eslm.records]
    fifty, last = found[0].task_records
    assert (fifty["iteration"], fifty["flops"], last["flops"]) == (50, 1e11, 4e11)
    assert (fifty["tasks/copa/acc"], fifty["tasks/piqa/bits_per_byte"]) == (0.2, 1.0)
    assert last["tasks/piqa/acc_norm"] == 0.8
    assert [r["flops"] for r in found[1].task_records] == [3e11]
    (table,) = task_tables([Group(run.path.stem, [run]) for run in found])
    assert table.header == ["", "piqa acc_norm", "copa acc", "mean"]
    assert table.rows == [
        ["clm (1 seed)", "0.8000", "0.2000", "0.5000"],
        ["eslm (1 seed)", "0.3000", "n/a", "n/a"],
    ]


def test_results_take_the_place_of_those_during_training(run_at, metrics_file, tmp_path):
    run = run_at("clm", **{"tasks/piqa/acc": 0.9})
    assert [r["iteration"] for r in run.task_records] == [100, 200]
    file = metrics_file("r.jsonl", result(tmp_path / "clm", 200, acc=0.5))
    (found,) = with_task_results([run], read_task_results([file]))
    assert [r["tasks/piqa/acc"] for r in found.task_records] == [0.5]


def test_accuracy_against_flops(run_at, metrics_file, tmp_path):
    during = run_at("eslm", **{"tasks/piqa/acc_norm": 0.5, "tasks/copa/acc": 0.7})
    file = metrics_file(
        "r.jsonl",
        result(tmp_path / "clm", 100, acc_norm=0.2),
        result(tmp_path / "clm", 100, "copa", acc=0.4),
        result(tmp_path / "clm", 200, acc_norm=0.3),  # without the other task, no mean
    )
    runs = with_task_results([run_at("clm"), during], read_task_results([file]))
    panel = accuracy_panel([Group(run.path.stem, [run]) for run in runs])
    means = [(xs, [spread.mean for spread in ys]) for xs, ys in panel.bands]
    assert means[0][0] == [2e11] and means[0][1] == pytest.approx([0.3])
    assert means[1][0] == [2e11, 4e11] and means[1][1] == pytest.approx([0.6, 0.6])
    assert (panel.xlabel, panel.scale) == ("FLOPs executed (GFLOP)", 1e9)
    assert panel.ylabel == "accuracy (2 tasks)"
    assert accuracy_panel([Group("clm", [run_at("clm")])]) is None


def test_results_that_belong_to_no_run_are_refused(run_at, metrics_file, tmp_path):
    runs = [run_at("clm"), run_at("eslm")]

    def refused(match, *lines, runs=runs):
        file = metrics_file("r.jsonl", *lines)
        with pytest.raises(ConfigError, match=match):
            with_task_results(runs, read_task_results([file]))

    folder = tmp_path / "clm"
    refused(r"r\.jsonl:1 is of checkpoints in other, .* none of the runs", result("other", 1))
    refused("more than one of the runs", result(folder, 1), runs=[runs[0], run_at("clm")])
    refused("a Hugging Face folder", result(folder, None))
    refused(
        r"r\.jsonl:2 is of iteration 201, but .*clm\.jsonl ends at 200",
        result(folder, 1),
        result(folder, 201),
    )
    refused(
        "piqa has limit 10 in .*r.jsonl:2 but None in .*r.jsonl:1",
        result(folder, 1),
        result(folder, 2, limit=10),
    )
    refused("load: field required.*tools/evaluate.py", {"iteration": 1})
    with pytest.raises(ConfigError, match="no such file"):
        read_task_results([tmp_path / "gone"])


def test_where_a_run_saved_makes_no_other_method_of_it(run_at):
    one, other = run_at("clm"), run_at("clm")
    other.settings.update(seed=2, save="elsewhere")
    assert len(group_runs([one, other])) == 1


def test_the_tool_takes_results(run_at, metrics_file, tmp_path, capsys):
    files = [str(run_at(name).path) for name in ("clm", "eslm")]
    file = metrics_file("r.jsonl", *[result(tmp_path / n, 200, acc=0.5) for n in ("clm", "eslm")])
    prefix = tmp_path / "report"
    more = ("--results", str(file), "--output-prefix", str(prefix))
    assert compare_runs.main([*files, *more]) == 0
    assert "piqa acc" in capsys.readouterr().out
    assert "Below: accuracy of each checkpoint" in prefix.with_suffix(".html").read_text()
