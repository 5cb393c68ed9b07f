"""compare-runs as a user calls it."""

from __future__ import annotations

from megatron_eslm.commands import compare_runs as tool
from megatron_eslm.reports.compare import NO_CONTROL

from .conftest import line


def test_tables_markdown_picture_and_page(make_run, tmp_path, capsys):
    runs = [
        make_run(f"{name}_s{seed}", (6.0, 4.0 - seed / 10), seed=seed, selection=name)
        for name in ("clm", "eslm")
        for seed in (1, 2)
    ]
    prefix = tmp_path / "new" / "report"
    files = [str(run.path) for run in runs]
    assert tool.main([*files, "--output-prefix", str(prefix)]) == 0
    printed = capsys.readouterr().out
    assert NO_CONTROL in printed.splitlines()
    text = prefix.with_suffix(".md").read_text()
    assert NO_CONTROL in text and "](<report.png>)" in text
    assert "| clm (2 seeds) | 3.8500 \\[3.8000, 3.9000\\] |" in text
    assert prefix.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "eslm (2 seeds)" in prefix.with_suffix(".html").read_text()


def test_options(make_run, tmp_path, capsys):
    files = [str(make_run(name, (6.0, 4.0), seed=1).path) for name in ("a", "b", "c")]
    options = ("--labels", "x", "y", "x", "--target", "5", "--baseline", "y", "--budgets", "3e11")
    prefix = tmp_path / "r"
    assert tool.main([*files, *options, "--output-prefix", str(prefix)]) == 0
    printed = capsys.readouterr().out
    assert "To a validation loss of 5.0000" in printed and "Saved against y to 5.0000" in printed
    assert "x (2 seeds)" in printed and "3e+11 executed" in printed


def test_errors_exit_with_2(metrics_file, tmp_path, capsys):
    good = str(metrics_file("a.jsonl", line(10, 4.0)))
    blind = str(metrics_file("b.jsonl", line(10)))
    for arguments, message in (
        ([good], "1 method given"),
        ([good, blind], "b.jsonl has no valid_loss"),
        ([good, good, "--labels", "x"], "--labels names 1 runs"),
        ([good, good, "--baseline", "x"], "--baseline x"),
        ([good, good, "--budgets", "1e9", "0"], "--budgets"),
        ([good, good, "--output-prefix", f"{good}/x"], "--output-prefix"),
        ([good, good, "--output-prefix", "folder/"], "--output-prefix folder/ is a folder"),
        ([good, str(tmp_path / "gone")], "cannot be read"),
    ):
        assert tool.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
