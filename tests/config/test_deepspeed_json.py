"""A user's DeepSpeed JSON: what it decides, where it must agree, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.errors import ConfigError

BASE = [
    *("--num-layers", "3", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "32", "--lr", "1e-3", "--train-iters", "10", "--data-path", "x"),
]

Parse = Callable[..., RunConfig]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    def parse(content: Any, *flags: str, world: int = 1) -> RunConfig:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return parse_run([*BASE, "--deepspeed_config", str(file), *flags], world)

    return parse


def refused(parse: Parse, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*args, **kwargs)
    return str(caught.value)


def test_the_file_fills_what_no_flag_says(parse: Parse) -> None:
    run = parse(
        {
            "_comment": "dropped",
            "train_micro_batch_size_per_gpu": 2,
            "train_batch_size": 8,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 1.0}},
            "csv_monitor": {"enabled": True, "output_path": "out"},
        },
        world=2,
    )
    assert (run.training.micro_batch_size, run.training.global_batch_size) == (2, 8)
    assert run.gradient_accumulation_steps == 2
    assert run.optimizer.clip_grad == 0.5
    assert run.engine.bf16 and run.engine.zero_stage == 2 and run.engine.cpu_offload
    full = run.deepspeed
    assert full["gradient_accumulation_steps"] == 2 and full["gradient_clipping"] == 0.5
    assert full["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert full["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "ratio": 1.0}
    assert full["csv_monitor"]["enabled"] and "_comment" not in full


def test_auto_leaves_it_to_the_flags(parse: Parse) -> None:
    run = parse(
        {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": "auto"},
        },
        *("--micro-batch-size", "4", "--global-batch-size", "8", "--bf16", "--zero-stage", "3"),
    )
    assert "auto" not in json.dumps(run.deepspeed)
    assert run.deepspeed["zero_optimization"]["stage"] == 3
    assert run.deepspeed["train_batch_size"] == 8
    assert run.deepspeed["gradient_accumulation_steps"] == 2


def test_saying_the_same_twice_is_fine(parse: Parse) -> None:
    content = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}
    run = parse(content, "--micro-batch-size", "4", "--zero-stage", "1")
    assert run.engine.zero_stage == 1


def test_the_file_alone_can_give_the_number_of_micro_steps(parse: Parse) -> None:
    content = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    run = parse(content, world=2)
    assert (run.training.global_batch_size, run.gradient_accumulation_steps) == (16, 4)


@pytest.mark.parametrize(
    ("content", "flags", "parts"),
    [
        (
            {"train_micro_batch_size_per_gpu": 2},
            ["--micro-batch-size", "4"],
            ["--micro-batch-size says 4", "train_micro_batch_size_per_gpu = 2"],
        ),
        (
            {"train_batch_size": 16},
            ["--global-batch-size", "8", "--micro-batch-size", "4"],
            ["--global-batch-size says 8", "train_batch_size = 16"],
        ),
        (
            {"gradient_clipping": 0.5},
            ["--clip-grad", "1"],
            ["--clip-grad says 1.0", "gradient_clipping = 0.5"],
        ),
        (
            {"bf16": {"enabled": False}},
            ["--bf16"],
            ["--bf16 says True", "bf16.enabled = False"],
        ),
        (
            {"zero_optimization": {"stage": 2}},
            ["--zero-stage", "1"],
            ["--zero-stage says 1", "zero_optimization.stage = 2"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            ["--no-cpu-offload"],
            ["--cpu-offload says False", "zero_optimization.offload_optimizer = True"],
        ),
    ],
)
def test_a_conflict_names_both_sides(
    parse: Parse, content: dict, flags: list[str], parts: list[str]
) -> None:
    text = refused(parse, content, *flags)
    for part in (*parts, "ds.json", 'Remove one of them or set the key to "auto"'):
        assert part in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"optimizer": {"type": "Adam"}}, ['"optimizer" section', "--lr", "Remove it"]),
        ({"scheduler": {"type": "WarmupLR"}}, ['"scheduler" section', "Remove it"]),
        ({"pipeline": {}}, ['"pipeline" section', "--pipeline-split", "Remove it"]),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            ['"tensor_parallel" section', "--tensor-model-parallel-size", "Remove it"],
        ),
        ('{"bf16": ', ["is not JSON", "line 1"]),
        ("[1]", ["must hold one JSON object"]),
        ({"bf16": True}, ["bf16 must be an object"]),
        ({"zero_optimization": 2}, ["zero_optimization must be an object"]),
        ({"bf16": {"enabled": 1}}, ["bf16.enabled must be true or false"]),
        ({"train_batch_size": "eight"}, ["train_batch_size must be a number"]),
        ({"train_batch_size": 8.5}, ["train_batch_size must be a whole number"]),
        ({"train_micro_batch_size_per_gpu": 0}, ["train_micro_batch_size_per_gpu 0 must be 1"]),
        ({"gradient_clipping": True}, ["gradient_clipping must be a number"]),
    ],
)
def test_files_that_cannot_be_used(parse: Parse, content: Any, parts: list[str]) -> None:
    text = refused(parse, content, "--micro-batch-size", "4")
    for part in ("--deepspeed_config", "ds.json", *parts):
        assert part in text


def test_what_the_file_sets_is_checked_as_a_flag_would_be(parse: Parse) -> None:
    base = ("--micro-batch-size", "4")
    assert "--zero-stage 5 is not one of" in refused(
        parse, {"zero_optimization": {"stage": 5}}, *base
    )
    both = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
    assert "--bf16 and --fp16 exclude each other" in refused(parse, both, *base)
    offload = {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}
    assert "--cpu-offload" in refused(parse, offload, *base)
    assert "--bf16 and --fp16" in refused(parse, {"fp16": {"enabled": True}}, "--bf16", *base)


def test_micro_steps_that_do_not_fit(parse: Parse) -> None:
    text = refused(
        parse,
        {"gradient_accumulation_steps": 3},
        *("--micro-batch-size", "4", "--global-batch-size", "8"),
    )
    assert "gradient_accumulation_steps = 3" in text and "--global-batch-size 8 makes it 2" in text


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--deepspeed_config none\.json cannot be read: No such"):
        parse_run([*BASE, "--deepspeed_config", "none.json"], 1)
    (tmp_path / "bad.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"bad\.json is not JSON"):
        parse_run([*BASE, "--deepspeed_config", str(tmp_path / "bad.json")], 1)


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[2].glob("ds_configs/*.json")), ids=lambda p: p.stem
)
def test_the_files_that_come_along_resolve(file: Path) -> None:
    flags = ["--micro-batch-size", "4", "--deepspeed_config", str(file)]
    assert parse_run([*BASE, *flags], 1).deepspeed["train_batch_size"] == 4
