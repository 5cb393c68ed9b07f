"""The table of layouts: every row resolves, everything else is refused by name, the docs agree."""

from __future__ import annotations

import itertools
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eslm.config.layouts import COMBINATIONS, RULES, layout_table
from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.errors import ConfigError

from ..argv import later_wins

ROOT = Path(__file__).parents[2]
BASE = [
    *("--num-layers", "6", "--hidden-size", "48", "--num-attention-heads", "6"),
    *("--seq-length", "32", "--lr", "1e-3", "--micro-batch-size", "2"),
    *("--train-iters", "10", "--data-path", "x"),
]
WORLD = 24
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"


def layout(*flags: str, world: int = WORLD) -> RunConfig:
    return parse_run(later_wins([*BASE, "--global-batch-size", "240", *flags]), world)


def refused(*flags: str, world: int = WORLD) -> str:
    with pytest.raises(ConfigError) as caught:
        layout(*flags, world=world)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
def test_what_the_table_says_is_what_resolves(tp: int, pp: int, stage: int, offload: bool) -> None:
    flags = [TP, str(tp), PP, str(pp), "--zero-stage", str(stage)]
    flags += ["--cpu-offload"] if offload else []
    # docs/design.md, section 5, said again without the table.
    allowed = (stage <= 1 or pp == 1) and not (offload and stage == 0)
    if allowed:
        run = layout(*flags)
        assert run.dp_size == WORLD // (tp * pp)
        assert run.gradient_accumulation_steps == 120 // run.dp_size
    else:
        assert "--zero-stage" in refused(*flags) or "--cpu-offload" in refused(*flags)


def test_one_row_for_every_run() -> None:
    assert sorted(row.pipeline for row in COMBINATIONS) == [False, True]
    for row in COMBINATIONS:
        assert set(row.offload_stages) <= set(row.zero_stages)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            f"--zero-stage 2 {PP} 2",
            f"--zero-stage 2 needs {PP} 1, but this run has 2; use --zero-stage 1 with a pipeline.",
        ),
        (
            f"--zero-stage 3 {PP} 3",
            f"--zero-stage 3 needs {PP} 1, but this run has 3; use --zero-stage 1 with a pipeline.",
        ),
        (
            "--zero-stage 0 --cpu-offload",
            "--cpu-offload keeps ZeRO's partitions in CPU memory, but --zero-stage 0 has none. Use "
            "--zero-stage 1, 2 or 3.",
        ),
        (
            f"--zero-stage 0 --cpu-offload {PP} 2",
            "--cpu-offload keeps ZeRO's partitions in CPU memory, but --zero-stage 0 has none. Use "
            "--zero-stage 1.",
        ),
        (
            "--bf16 --zero-stage 0",
            "--bf16 needs ZeRO, but --zero-stage is 0; use --zero-stage 1, which on one rank costs "
            "nothing.",
        ),
        (
            f"{TP} 4",
            f"--num-attention-heads 6 is not a multiple of {TP} 4. For this model it can be 1, 2, "
            "3 or 6; or change --num-attention-heads.",
        ),
        (
            f"{TP} 3 --ffn-hidden-size 64",
            f"--ffn-hidden-size 64 is not a multiple of {TP} 3. For this model it can be 1 or 2; "
            "or change --ffn-hidden-size.",
        ),
        (
            "--sequence-parallel",
            f"--sequence-parallel shards positions over tensor-parallel ranks, but {TP} is 1. "
            "Raise it, or leave out --sequence-parallel.",
        ),
        (
            f"--sequence-parallel {TP} 3",
            f"--sequence-parallel needs --seq-length 32 to be a multiple of {TP} 3; change one of "
            "them, or leave out --sequence-parallel.",
        ),
        (
            f"{PP} 8",
            f"{PP} 8 needs one block per stage, but --num-layers is 6; use at most 6 stages.",
        ),
        (
            f"{PP} 4 --eslm-proxy-layers 4",
            "--eslm-proxy-layers 4 must lie in the first stage, which has at most 3 of "
            f"--num-layers 6 blocks when {PP} is 4. Lower one of the two.",
        ),
        (
            f"{PP} 3 --pipeline-split 3,3",
            f"--pipeline-split 3,3 names 2 stages, but {PP} is 3; give one number per stage, or "
            "leave out --pipeline-split.",
        ),
        (
            f"{PP} 3 --pipeline-split 2,2,3",
            "--pipeline-split 2,2,3 has 7 blocks, but --num-layers is 6; make them equal.",
        ),
        (
            f"{PP} 2 --pipeline-split 1,5 --eslm-proxy-layers 2",
            "--pipeline-split 1,5 gives the first stage 1 blocks, but --eslm-proxy-layers 2 must "
            "lie in it. Give it more, or lower --eslm-proxy-layers.",
        ),
        *(
            (
                f"--pipeline-split {split}",
                f"--pipeline-split {split} must be the number of blocks of each stage, 1 or more, "
                "separated by commas, as in 4,4,3,1.",
            )
            for split in ("4;2", "0,6", "six", "3,,3", "-1,7")
        ),
        (
            "--activation-checkpoint-interval -1",
            "--activation-checkpoint-interval -1 must be 0 or more.",
        ),
        (
            "--dry-run-world-size 8",
            "--dry-run-world-size 8 has no effect without --dry-run; give that too, or "
            "leave it out.",
        ),
        ("--dry-run --dry-run-world-size 0", "--dry-run-world-size 0 must be 1 or more."),
    ],
)
def test_a_refusal_names_flags_values_and_remedy(flags: str, message: str) -> None:
    assert refused(*_words(flags)) == message


def _words(flags: str) -> list[str]:
    # argparse takes "-1,7" for an option, so values are joined to their flags.
    words: list[str] = []
    for word in flags.split():
        if word.startswith("--"):
            words.append(word)
        else:
            words[-1] += f"={word}"
    return words


def test_fp16_in_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    assert layout("--fp16").engine.fp16
    assert refused("--fp16", PP, "2") == (
        f"--fp16 needs {PP} 1, but this run has 2; use --bf16 with a pipeline."
    )


def test_processes_that_do_not_divide() -> None:
    text = refused(TP, "2", world=3)
    assert "3 processes cannot be divided" in text and f"{TP} 2" in text
    assert f"{PP} 2 = 4" in refused(TP, "2", PP, "2", world=6)


@pytest.mark.parametrize(
    "flags",
    [
        (PP, "2", "--pipeline-split", "2, 4", "--eslm-proxy-layers", "2"),
        (PP, "6"),
        (PP, "4", "--eslm-proxy-layers", "3"),
        ("--pipeline-split", "6"),
        (TP, "2", "--sequence-parallel", "--zero-stage", "3"),
        (TP, "6", PP, "4", "--bf16", "--activation-checkpoint-interval", "2"),
        # Who has no early exit needs no blocks for it in the first stage.
        (PP, "6", "--eslm-proxy-layers", "4", "--eslm-level", "token"),
        (PP, "6", "--eslm-proxy-layers", "4", "--selection", "random"),
    ],
    ids=" ".join,
)
def test_what_keeps_to_the_rules_resolves(flags: tuple[str, ...]) -> None:
    assert layout(*flags).engine.zero_stage in (0, 1, 3)


def test_the_split_as_numbers() -> None:
    assert layout(PP, "2", "--pipeline-split", "2, 4").engine.pipeline_blocks == (2, 4)
    assert layout(PP, "2").engine.pipeline_blocks is None


def test_few_micro_steps_in_a_long_pipeline_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_run([*BASE, PP, "4", "--global-batch-size", "16", "--selection", "clm"], 16)
    assert caplog.messages == [
        f"{PP} 4 with 2 micro-steps per optimizer step leaves every stage idle for 60% of the "
        "time. Raise --global-batch-size, or use fewer stages."
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        parse_run([*BASE, PP, "4", "--global-batch-size", "32", "--selection", "clm"], 16)
        parse_run([*BASE, "--global-batch-size", "2"], 1)
    assert not caplog.messages


def test_a_pipeline_sends_whole_activations() -> None:
    assert layout(PP, "2", TP, "2").deepspeed["pipeline"] == {
        "pipe_partitioned": False,
        "grad_partitioned": False,
    }
    assert "pipeline" not in layout(TP, "2").deepspeed


def test_a_dry_run_of_more_processes_than_there_are() -> None:
    flags = ("--dry-run", "--dry-run-world-size", "24", PP, "4")
    run = layout(*flags, world=1)
    assert (run.dp_size, run.gradient_accumulation_steps) == (6, 20)


def files_of_rows() -> list[tuple[str, bool]]:
    """Every file that the table names, and whether its row is that of pipelines."""
    found = []
    for row in COMBINATIONS:
        for name in row.files:
            begin, _, rest = name.partition("{")
            values, _, end = rest.partition("}")
            names = [f"{begin}{v}{end}" for v in values.split(",")] if rest else [name]
            found += [(n, row.pipeline) for n in names]
    return found


@pytest.mark.parametrize(("name", "pipeline"), files_of_rows())
@pytest.mark.parametrize("tp", [1, 2])
def test_files_of_the_table_resolve_in_their_layouts(name: str, pipeline: bool, tp: int) -> None:
    flags = ["--deepspeed_config", str(ROOT / "ds_configs" / name), TP, str(tp)]
    run = layout(*flags, PP, "4" if pipeline else "1")
    assert f"zero{run.engine.zero_stage}" in name
    assert run.engine.cpu_offload == ("offload" in name)
    assert run.engine.bf16 == ("bf16" in name)
    if pipeline and "bf16" in name:
        assert run.deepspeed["data_types"]["grad_accum_dtype"] == "fp32"


def test_the_table_names_every_file() -> None:
    there = {p.name for p in (ROOT / "ds_configs").glob("*.json")} - {"monitors.json"}
    assert there == {name for name, _ in files_of_rows()}
    contents = [
        "\n".join(x for x in p.read_text().splitlines() if "_comment" not in x)
        for p in (ROOT / "ds_configs").glob("*.json")
    ]
    for one, other in itertools.combinations(contents, 2):
        assert one != other, "two files that do the same"


def test_a_float32_pipeline_file_refuses_half_precision() -> None:
    file = str(ROOT / "ds_configs" / "pipeline_zero0.json")
    text = refused(PP, "2", "--bf16", "--deepspeed_config", file)
    assert "--bf16 says True" in text and "bf16.enabled = False" in text


def test_the_docs_have_the_table_that_is_enforced() -> None:
    text = (ROOT / "docs" / "layouts.md").read_text()
    begin, end = "<!-- --help-layouts: begin -->\n", "\n<!-- --help-layouts: end -->"
    assert text.count(begin) == text.count(end) == 1
    printed = text[text.index(begin) + len(begin) : text.index(end)]
    assert printed.strip() == layout_table(), (
        "copy the output of --help-layouts into docs/layouts.md"
    )


def commands_of_the_docs() -> list[str]:
    text = (ROOT / "docs" / "layouts.md").read_text().replace(" \\\n", " ")
    return [line.strip() for line in text.splitlines() if "pretrain_gpt.py --model-size" in line]


@pytest.mark.parametrize("command", commands_of_the_docs())
def test_commands_of_the_docs_resolve(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    launcher, flags = command.split(" pretrain_gpt.py ")
    counts = launcher.split()
    sizes = [int(counts[i + 1]) for i, word in enumerate(counts) if word.startswith("--num_")]
    run = parse_run(flags.split(), math.prod(sizes))
    assert run.model.model_size and run.gradient_accumulation_steps >= 1


def test_the_docs_have_a_command_for_every_file() -> None:
    commands = "\n".join(commands_of_the_docs())
    for name, _ in files_of_rows():
        assert f"ds_configs/{name}" in commands


def test_help_layouts_prints_the_table_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), "--help-layouts"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, layout_table() + "\n"), done.stderr
    for rule in RULES:
        assert rule.flag in done.stdout


def test_help_layouts_is_no_yaml_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("help_layouts: true\n")
    with pytest.raises(ConfigError, match="there is no option help_layouts"):
        parse_run(["--config", str(tmp_path / "run.yaml")], 1)
