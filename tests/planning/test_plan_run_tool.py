"""tools/plan_run.py as a user calls it, and the tables of docs/scaling.md that it prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_eslm.config.run import parse_run
from megatron_eslm.planning.imbalance import expected_largest
from megatron_eslm.planning.request import Request
from tools.plan_run import main

ROOT = Path(__file__).resolve().parents[2]
ISSUE = "--model-size 1.5B --gpus 32 --gpu a100-80g --interconnect infiniband-hdr --alpha 0.1"


def run(capsys: pytest.CaptureFixture, command: str) -> str:
    assert main(shlex.split(command)) == 0
    return capsys.readouterr().out


def test_the_report_names_everything(capsys: pytest.CaptureFixture) -> None:
    text = run(capsys, f"{ISSUE} --pipeline-model-parallel-size 4 --micro-batch-size 10")
    for line in (
        r"^Best of \d+ layouts that fit",
        r"^memory a GPU +[\d.]+ GiB = weights",
        r"^stage +blocks +FLOPs a step",
        r"^bubble +[\d.]+% .*\([\d.]+% if stages were equal",
        r"hidden states of kept rows +send +\d+ x",
        r"gradients: ZeRO 1 +all-reduce",
        r"selection: scores of rows +all-gather",
        r"^ +blocks: matrix products +[\d.]+ +[\d.]+%$",
        r"^MFU +[\d.]+%",
        r"^to clm +a step takes [\d.]+ x",
        r"rows: hidden states +all-to-all",
        r"^imbalance +of \d+ rows a rank keeps .* change hands\); dealt evenly it works on \d+, in",
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
        ("--no-eslm-balance", r"of 10 rows a rank has 9.00 on average, .* 10.00; .*--eslm-balance"),
        ("--eslm-scope local", r"of 10 rows every rank keeps 9.00: nobody waits$"),
        ("--eslm-balance", r"of 10 rows .* and the one with most 10.00 .* it works on 9, .*"),
    ],
)
def test_the_report_of_other_ranks(capsys: pytest.CaptureFixture, flags: str, line: str) -> None:
    layout = "--gpus 32 --global-batch-size 640 --micro-batch-size 10 --zero-stage 1"
    text = run(capsys, f"--model-size 124M {layout} --tensor-model-parallel-size 1 {flags}")
    assert re.search(rf"^imbalance +{line}", text, re.MULTILINE)
    assert ("rows: hidden states" in text) == (flags == "--eslm-balance")
    assert ("global scope, rows stay" in text) == (flags == "--no-eslm-balance")


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
        ("--gpus 53", "error: --global-batch-size 160 cannot be shared out"),
        ("--top 0", "error: --top 0 must be 1 or more"),
        ("--efficiency -1", "error: --efficiency -1 must be"),
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


def test_table_of_imbalance(capsys: pytest.CaptureFixture) -> None:
    head, *body = rows(run(capsys, "--model-size 124M --table imbalance"))
    assert len(body) == 3 * 8
    for row in body:
        cell = dict(zip(head, row, strict=True))
        micro, dp = int(cell["rows a rank"]), int(cell["DP"])
        kept = int(0.9 * micro * dp + 1e-9)
        assert float(cell["rows stay: largest"]) == pytest.approx(
            expected_largest(kept, micro, dp), abs=0.006
        )
        assert int(cell["dealt: largest"]) == -(-kept // dp)
        stay, dealt = float(cell["rows stay / clm"]), float(cell["dealt / clm"])
        assert float(cell["if ranks were equal"]) < min(stay, dealt)
        # A row less makes up for dealing; where all rows of a rank are kept anyway, nothing does.
        assert (dealt < stay) == (-(-kept // dp) < micro)


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
    for word in ("124M", "1.5B", "13B", "scaling", "imbalance", "tokens", "thresholds"):
        assert word in commands


@pytest.mark.slow
@pytest.mark.parametrize("command, table", BLOCKS, ids=[command for command, _ in BLOCKS])
def test_tables_of_the_document(capsys: pytest.CaptureFixture, command: str, table: str) -> None:
    assert run(capsys, command) == table
