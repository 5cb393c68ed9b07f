"""The files that a command line names: shapes from checkpoints, and data before more is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.training.command_line import read_command_line

FLAGS = ["--micro-batch-size", "4", "--train-iters", "10", "--lr", "1e-3"]


def read(data: list[str], *flags: str | Path) -> RunConfig:
    return read_command_line(["--data-path", data[0], *FLAGS, *map(str, flags)], 1)


def refused(*flags: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_command_line([*map(str, flags)], 1)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["trained", "weights", "trained/iter_0000004"])
def test_shape_of_a_checkpoint(data: list[str], start: Path, name: str) -> None:
    run = read(data, "--load", start / name)
    stored = json.loads(next((start / name).rglob("run.json")).read_text())["shape"]
    assert run.shape(257).to_dict() == {**stored, "padded_vocab_size": 384}
    assert run.model.num_layers == 3
    # What is given stays, and is compared with the checkpoint when that is opened.
    assert read(data, "--load", start / name, "--num-layers", "5").model.num_layers == 5


def test_a_damaged_checkpoint_leaves_the_word_to_the_one_before(
    data: list[str], start: Path, tmp_path: Path
) -> None:
    for name in ("iter_0000004", "iter_0000005", "iter_0000006", "iter_0000007"):
        shutil.copytree(start / "trained" / "iter_0000004", tmp_path / name)
    (tmp_path / "iter_0000007" / "run.json").write_text('{"shape": {"num_layers": "three"}}')
    (tmp_path / "iter_0000006" / "run.json").write_text("[" * 100_000)
    (tmp_path / "iter_0000005" / "run.json").unlink()
    assert read(data, "--load", tmp_path).model.num_layers == 3


def test_a_requeued_job_begins_by_its_flags(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        flags = ("--load", run, "--save", run)
        assert read(data, *flags, "--model-size", "124M").model.num_layers == 12
        text = refused("--data-path", data[0], *FLAGS, *flags)
        assert text.startswith("--num-layers, --hidden-size, --num-attention-heads and --seq-")
        run.mkdir(exist_ok=True)


def test_no_checkpoint_where_one_is_named(data: list[str], start: Path, tmp_path: Path) -> None:
    named = ("--data-path", data[0], "--load")
    assert refused(*named, tmp_path / "none").endswith("none: there is no such folder.")
    assert "contains no checkpoint" in refused(*named, start / "hf")
    shutil.copytree(start / "trained" / "iter_0000004", tmp_path / "iter_0000004")
    (tmp_path / "iter_0000004" / "run.json").write_text("")
    assert "iter_0000004 is damaged: run.json" in refused(*named, tmp_path)


@pytest.mark.parametrize("kind", ["missing", "garbage", "empty", "one of two", "split", "meta"])
def test_data_are_looked_at_before_more_is_asked_for(
    data: list[str], tmp_path: Path, kind: str
) -> None:
    prefix = tmp_path / "pair"
    bad: list[str | Path] = ["--data-path", prefix]
    if kind == "garbage":
        for suffix in (".bin", ".idx"):
            prefix.with_suffix(suffix).write_bytes(bytes(range(200)))
    elif kind == "empty":
        for suffix in (".bin", ".idx"):
            prefix.with_suffix(suffix).touch()
    elif kind == "one of two":
        bad = ["--data-path", "0.5", data[0], "0.5", prefix]
    elif kind in ("split", "meta"):
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{data[0]}{suffix}", f"{prefix}{suffix}")
        (tmp_path / "pair.meta.json").write_text("[" if kind == "meta" else "{}")
        if kind == "split":
            (tmp_path / "pair.meta.json").unlink()
            bad += ["--split", "0,1"]
    text = refused(*bad)
    named = "--split '0,1'" if kind == "split" else str(prefix)
    assert named in text and "is not set" not in text and "are not set" not in text
