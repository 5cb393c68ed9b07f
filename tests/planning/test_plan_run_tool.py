"""megatron-eslm plan as a user calls it, and the tables of docs/scaling.md that it prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_eslm.commands.plan import main
from megatron_eslm.config.run import parse_run
from megatron_eslm.planning.request import Request

ROOT = Path(__file__).resolve().parents[2]
ISSUE = "--model-size 1.5B --gpus 32 --gpu a100-80g --interconnect infiniband-hdr --alpha 0.1"


def run(capsys: pytest.CaptureFixture, command: str) -> str:
    assert main(shlex.split(command)) == 0
    return capsys.readouterr().out


def test_the_report_names_everything(capsys: pytest.CaptureFixture) -> None:
    text = run(capsys, f"{ISSUE} --pipeline-model-parallel-size 4 --micro-batch-size 1")
    for line in (
        r"^Best of \d+ layouts that fit",
        r"^memory / GPU +[\d.]+ GiB = weights",
        r"^stage +blocks +FLOPs / step",
        r"^bubble +[\d.]+% .*\([\d.]+% if stages were equal",
        r"hidden states +send +\d+ x",
        r"gradients: ZeRO 1 +all-reduce",
        r"proxy: scores of candidates +all-gather",
        r"^ +selection: proxy pass +[\d.]+ +[\d.]+%$",
        r"^layout .* 20 micro-steps, 18 of them trained on$",
        r"^ +blocks: matrix products +[\d.]+ +[\d.]+%$",
        r"^MFU +[\d.]+%",
        r"^to clm +a step takes [\d.]+ x",
        r"^imbalance +of \d+ rows a rank has \d+.00 on average, .* most \d+.00; in tokens",
        r"^Assumed\n- matrix products",
    ):
        assert re.search(line, text, re.MULTILINE), line
    flags = re.search(r"^flags +(.*)$", text, re.MULTILINE)
    assert flags
    request = Request(model_size="1.5B", gpus=32)
    assert parse_run([*request.flags, *flags[1].split()], 32).dp_size == 8


def test_values(capsys: pytest.CaptureFixture) -> None:
    out = json.loads(run(capsys, f"{ISSUE} --json --top 3"))
    assert len(out["plans"]) == 3 and len(out["assumed"]) == 5
    for plan in out["plans"]:
        assert plan["step_seconds"] == pytest.approx(sum(plan["parts_seconds"].values()))
        assert plan["ratio_to_clm"] == plan["step_seconds"] / plan["step_seconds_clm"]
        assert 0 < plan["mfu"] < 1 and plan["kept_tokens"] == pytest.approx(0.8, abs=0.03)
        assert plan["step_seconds_balanced"] < plan["step_seconds"]
        assert sum(plan["stages"]) == 48


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--eslm-scope global", r"of 10 rows a rank has 9.00 .* most 10.00; .*--eslm-scope step"),
        ("--eslm-scope local", r"of 10 rows every rank keeps 9.00: no rank waits$"),
    ],
)
def test_the_report_of_other_scopes(capsys: pytest.CaptureFixture, flags: str, line: str) -> None:
    layout = "--gpus 32 --global-batch-size 640 --micro-batch-size 10 --zero-stage 1"
    text = run(capsys, f"--model-size 124M {layout} --tensor-model-parallel-size 1 {flags}")
    assert re.search(rf"^imbalance +{line}", text, re.MULTILINE)
    assert "proxy" not in text.replace("proxy of 1 block", "")


@pytest.mark.parametrize("selection", ["clm", "random", "rho1"])
def test_other_selections(capsys: pytest.CaptureFixture, selection: str) -> None:
    command = f"--model-size 124M --gpus 4 --selection {selection} --top 1"
    (plan,) = json.loads(run(capsys, f"{command} --json"))["plans"]
    if selection == "clm":
        assert plan["ratio_to_clm"] == plan["kept_tokens"] == 1
    else:
        assert plan["selection_seconds"] > 0 and plan["kept_tokens"] < 0.91
    assert selection in run(capsys, command)


@pytest.mark.parametrize(
    "command, message",
    [
        ("--gpu b300", "error: --gpu b300 is not one of"),
        ("--model-size 13B --gpus 1", "error: --model-size 13B does not fit"),
        ("--gpus 53", "error: --global-batch-size 160 cannot be divided over"),
        ("--top 0", "error: --top 0 must be 1 or more"),
        ("--efficiency -1", "error: --efficiency -1 is outside (0, 1]"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture, command: str, message: str) -> None:
    assert main(shlex.split(command)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1


def rows(table: str) -> list[list[str]]:
    lines = table.strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return [cells[0], *cells[2:]]


@pytest.mark.parametrize("gpu", ["a100-80g", "h100-80g"])
def test_published_throughputs_are_near(capsys: pytest.CaptureFixture, gpu: str) -> None:
    head, *body = rows(run(capsys, f"--gpu {gpu} --table published"))
    errors = [float(row[head.index("error")].rstrip("%")) for row in body]
    assert len(errors) >= 6 and max(map(abs, errors)) <= 12
    assert main(["--gpu", "a100-40g", "--table", "published"]) == 2
    assert "a100-80g, h100-80g only" in capsys.readouterr().err


DOCUMENT = ROOT / "docs" / "scaling.md"
BLOCKS = re.findall(
    r"^    python tools/plan_run\.py (.*--table \w+.*)\n\n((?:\|.*\n)+)",
    DOCUMENT.read_text(),
    re.MULTILINE,
)


def test_the_document_has_tables() -> None:
    commands = " ".join(command for command, _ in BLOCKS)
    for word in ("124M", "1.5B", "13B", "scaling"):
        assert word in commands


@pytest.mark.slow
@pytest.mark.parametrize("command, table", BLOCKS, ids=[command for command, _ in BLOCKS])
def test_tables_of_the_document(capsys: pytest.CaptureFixture, command: str, table: str) -> None:
    assert run(capsys, command) == table
