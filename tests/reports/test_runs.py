"""Reading metrics files."""

from __future__ import annotations

import logging
import os

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.runs import read_run

from .conftest import line


def iterations(run):
    return [r["iteration"] for r in run.records]


def test_settings_and_records(metrics_file):
    path = metrics_file("a.jsonl", {"run": {"selection": "eslm"}}, line(10), line(20, 4.0))
    run = read_run(path)
    assert run.settings == {"selection": "eslm"}
    assert iterations(run) == [10, 20]
    assert [r["valid_loss"] for r in run.evaluations] == [4.0]


def test_losses_of_domains(metrics_file):
    by = {"book": 3.0, "code": None}
    both = {"valid_loss_by_domain": by, "test_loss_by_domain": {"news": 4.1}}
    run = read_run(metrics_file("a.jsonl", line(10, 4.0, test_loss=4.1, **both)))
    assert run.evaluations[0].items() >= both.items()
    assert run.iterations == 10


def test_no_settings(metrics_file):
    assert read_run(metrics_file("a.jsonl", line(1))).settings == {}


def test_resumed_run_counts_the_last_time(metrics_file):
    path = metrics_file(
        "a.jsonl",
        {"run": {"seed": 1}},
        *[line(i, valid_loss=9.0, tokens=1) for i in (10, 20, 30, 40)],
        {"run": {"seed": 2}},
        *[line(i, valid_loss=3.0, tokens=2) for i in (20, 30)],
    )
    run = read_run(path)
    # 40 was done by the part of the run that was thrown away.
    assert iterations(run) == [10, 20, 30]
    assert [r["valid_loss"] for r in run.records] == [9.0, 3.0, 3.0]
    assert run.last("tokens") == 2
    assert run.settings == {"seed": 2}


@pytest.mark.parametrize("tail", ['{"iteration": 20, "lo', "nonsense", "[1, 2]"])
def test_torn_last_line_is_skipped_with_a_warning(metrics_file, caplog, tail):
    path = metrics_file("a.jsonl", line(10, 4.0))
    path.write_text(path.read_text() + tail)
    with caplog.at_level(logging.WARNING):
        run = read_run(path)
    assert iterations(run) == [10]
    assert "skipped the incomplete last line" in caplog.text
    assert "a.jsonl:2: " in caplog.text


def test_broken_last_line_with_a_line_end_is_an_error(metrics_file):
    path = metrics_file("a.jsonl", line(10, 4.0))
    path.write_text(path.read_text() + '{"iteration": 20, "loss": "low"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: .*\"loss\" is 'low'"):
        read_run(path)


def test_torn_line_of_a_run_that_was_resumed(metrics_file, caplog):
    path = metrics_file("a.jsonl", line(10, 4.0))
    resumed = metrics_file("b.jsonl", {"run": {"seed": 2}}, line(20, 3.0)).read_text()
    path.write_text(path.read_text() + '{"iteration": 20, "lo\n' + resumed)
    with caplog.at_level(logging.WARNING):
        run = read_run(path)
    assert iterations(run) == [10, 20]
    assert "a.jsonl:2: " in caplog.text


def test_two_broken_lines_at_the_end(metrics_file):
    path = metrics_file("a.jsonl", line(10))
    path.write_text(path.read_text() + "x\ny\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: "):
        read_run(path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"iteration": 1', "the line is not JSON"),
        ("7", "not a JSON object"),
        ('{"loss": 1.0}', 'no "iteration"'),
        ('{"iteration": 1.5}', 'no "iteration"'),
        ('{"iteration": 1, "valid_loss": "low"}', "\"valid_loss\" is 'low', not a number"),
        (
            '{"iteration": 1, "valid_loss_by_domain": {"book": "low"}}',
            "\"valid_loss_by_domain/book\" is 'low', not a number",
        ),
        ('{"iteration": 1, "tokens": {"book": 1}}', "\"tokens\" is {'book': 1}, not a number"),
        ('{"run": 3}', '"run" does not hold settings'),
        ('{"run": {"seed": [1]}}', '"run/seed" is [1], not a whole number'),
        ('{"run": {"seed": true}}', '"run/seed" is True, not a whole number'),
        ('{"run": {"selection": ["clm"]}}', "\"run/selection\" is ['clm'], not a name"),
        ('{"iteration": true}', 'no "iteration"'),
        ('{"iteration": -1}', 'no "iteration"'),
        ('{"iteration": 1, "iteration": 2}', "the key 'iteration' is given twice"),
        ('{"iteration": 1, "loss": true}', '"loss" is True, not a number'),
        ('{"iteration": 1, "flops": 1' + "0" * 400 + "}", '"flops" is 10'),
        ('{"iteration": 1, "loss": 1' + "0" * 5000 + "}", "is not JSON"),
        ('{"iteration": ' + "[" * 100_000, "nested too deep"),
        ('{"run": {"x": ' + '{"x": ' * 100_000, "nested too deep"),
    ],
)
def test_other_broken_lines_name_file_and_line(metrics_file, broken, message):
    path = metrics_file("a.jsonl", line(10))
    path.write_text(path.read_text() + "\n" + broken + "\n" + '{"iteration": 20}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: .*repair or remove") as error:
        read_run(path)
    assert message in str(error.value)


def test_missing_and_empty_files(metrics_file, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read.*none\.jsonl: No such file"):
        read_run(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigError, match=r"cannot be read.*pipe\.jsonl .* is a named pipe"):
        read_run(tmp_path / "pipe.jsonl")
    for items in ([], [{"run": {}}]):
        with pytest.raises(ConfigError, match="holds no metrics"):
            read_run(metrics_file("empty.jsonl", *items))


def test_elapsed_seconds_are_summed_where_missing(metrics_file):
    path = metrics_file(
        "a.jsonl",
        line(0, 9.0),
        line(10, step_seconds=0.5),
        line(30, step_seconds=1.0),
        line(40, elapsed_seconds=100.0, step_seconds=1.0),
        line(50, step_seconds=2.0),
        line(60),
        line(70, step_seconds=2.0),
    )
    elapsed = [r["elapsed_seconds"] for r in read_run(path).records]
    assert elapsed == [0.0, 5.0, 25.0, 100.0, 120.0, None, None]


def test_mean_weighs_lines_by_their_iterations(metrics_file):
    path = metrics_file(
        "a.jsonl",
        line(0, kept_tokens=None),
        line(10, kept_tokens=1.0),
        line(40, kept_tokens=0.6),
        line(50, kept_tokens=float("nan")),
    )
    run = read_run(path)
    assert run.mean("kept_tokens") == pytest.approx((10 * 1.0 + 30 * 0.6) / 40)
    assert run.mean("absent") is None
    assert run.last("absent") is None
