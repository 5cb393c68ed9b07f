"""tools/compare_runs.py as a user calls it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_eslm.reports.compare import NO_CONTROL

from .conftest import line


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "compare_runs.py"
    spec = importlib.util.spec_from_file_location("compare_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_markdown_and_picture(tool, metrics_file, tmp_path, capsys):
    files = [
        str(metrics_file(name, line(10, 4.0, flops=1e9, elapsed_seconds=2.0)))
        for name in ("a.jsonl", "b.jsonl")
    ]
    prefix = tmp_path / "new" / "report"
    assert tool.main([*files, "--output-prefix", str(prefix)]) == 0
    printed = capsys.readouterr().out
    assert NO_CONTROL in printed.splitlines()
    assert NO_CONTROL in prefix.with_suffix(".md").read_text()
    assert prefix.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_errors_exit_with_2(tool, metrics_file, tmp_path, capsys):
    good = str(metrics_file("a.jsonl", line(10, 4.0)))
    blind = str(metrics_file("b.jsonl", line(10)))
    for arguments, message in (
        ([good], "needs two or more"),
        ([good, blind], "b.jsonl has no valid_loss"),
        ([good, good, "--labels", "x"], "--labels names 1 runs"),
        ([good, good, "--output-prefix", f"{good}/x"], "--output-prefix"),
        ([good, str(tmp_path / "gone")], "cannot be read"),
    ):
        assert tool.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error


def test_default_labels_tell_runs_apart(tool):
    assert tool.default_labels(["x/a.jsonl", "x/b.jsonl"]) == ["a", "b"]
    assert tool.default_labels(["x/a.jsonl", "y/a.jsonl"]) == ["x/a", "y/a"]
    assert tool.default_labels(["a.jsonl", "a.jsonl"]) == ["a #1", "a #2"]
