"""What a run writes beside checkpoints: one run at a time, and a full disk costs no training."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.manifest import list_checkpoints
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.lock import FileLock
from megatron_eslm.training import dump
from megatron_eslm.training.evaluate import Evaluation
from megatron_eslm.training.loop import Callback, Trainer
from megatron_eslm.training.progress_report import MetricsFile
from tests.harness import run_ranks

from .runs import read_metrics, refusal, train, words


def full_metrics(trainer: Trainer) -> None:
    """From the second line on."""
    if trainer.outputs.metrics is not None:
        trainer.outputs.metrics._file = open("/dev/full", "a")  # noqa: SIM115


def full_dump(trainer: Trainer) -> None:
    def refuse(path: Path, arrays: dict) -> None:
        if path.name.startswith("iter0000002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    dump._write = refuse


def no_monitor(trainer: Trainer) -> None:
    if trainer.mesh.rank == 0:
        shutil.rmtree(trainer.engine.monitor.csv_monitor.log_dir)


def stopped(argv: list[str], prepare: Callable[[Trainer], None], metrics: Path | None) -> str:
    with pytest.raises(ConfigError) as caught:
        train(argv, metrics, prepare)
    return str(caught.value)


def test_a_disk_that_takes_no_records_stops_the_run_behind_a_checkpoint(
    data: list[str], tmp_path: Path
) -> None:
    """Every rank stops with the one message, also where the one that writes is alone to know."""
    config = tmp_path / "ds.json"
    monitor = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}
    config.write_text(json.dumps({"csv_monitor": monitor}))
    tp, pp = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
    cases = {
        # flags, what breaks, the iteration that is saved: ranks vote in the step after it
        "metrics": ((tp, 2), full_metrics, 1),
        "last": ((tp, 2, "--eval-iters", 0, "--log-interval", 4), full_metrics, 4),
        "dump": ((pp, 2, "--dump-selection", tmp_path / "dump"), full_dump, 3),
        "monitor": (("--deepspeed_config", config, "--micro-batch-size", 4), no_monitor, 1),
    }

    def fn(rank: int) -> dict[str, str]:
        texts = {}
        for name, (flags, prepare, _) in cases.items():
            metrics = tmp_path / f"{name}.jsonl" if "metrics" in prepare.__name__ else None
            argv = words(data, "--save", tmp_path / name, *flags)
            texts[name] = stopped(argv, prepare, metrics)
        argv = words(data, tp, 2)
        return texts | {"nowhere": stopped(argv, full_metrics, tmp_path / "nowhere.jsonl")}

    first, second = run_ranks(2, fn)
    assert first == second
    starts = {
        "metrics": f"--metrics-file {tmp_path / 'metrics.jsonl'}: No space left",
        "last": f"--metrics-file {tmp_path / 'last.jsonl'}: No space left",
        "dump": f"--dump-selection {tmp_path / 'dump'}: No space left",
        "monitor": f"--deepspeed_config {config}: monitor: No such file",
        "nowhere": f"--metrics-file {tmp_path / 'nowhere.jsonl'}: No space left",
    }
    for name, text in first.items():
        assert text.startswith(starts[name]), text
    for name, (_, _, iteration) in cases.items():
        assert f"stopped; iteration {iteration} is saved in {tmp_path / name}." in first[name]
        assert find_checkpoint(tmp_path / name).state().iteration == iteration
        assert not (tmp_path / name / ".lock").exists()
    assert "iteration 1 is lost, as --save is not set" in first["nowhere"]


def test_a_line_that_was_not_taken_is_written_with_the_next(tmp_path: Path) -> None:
    metrics = MetricsFile(str(tmp_path / "m.jsonl"), {}, resumed=False)
    file, metrics._file = metrics._file, open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        metrics.write({"iteration": 1})
    metrics._file = file
    metrics.write({"iteration": 2})
    metrics.close()
    assert [line["iteration"] for line in read_metrics(tmp_path / "m.jsonl")] == [2]


def test_a_metrics_file_that_cannot_be_begun(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", refuse)
        with pytest.raises(ConfigError, match=r"--metrics-file .*m\.jsonl: No space left"):
            MetricsFile(str(tmp_path / "m.jsonl"), {}, resumed=False)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        MetricsFile(str(tmp_path / "pipe"), {}, resumed=True)
    assert not [*tmp_path.glob(".*")]


def _hold(paths: list[Path], ready) -> None:
    for path in paths:
        assert FileLock(path).acquire()
    ready.set()
    time.sleep(60)


def test_what_another_run_writes_to_is_refused(data: list[str], tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    (tmp_path / "dump").mkdir()
    locks = [tmp_path / "dump" / ".dump.lock", tmp_path / ".m.jsonl.lock"]
    other = fork.Process(target=_hold, args=(locks, ready))
    other.start()
    assert ready.wait(20)

    def fn(rank: int) -> list[str]:
        flags = ("--save", tmp_path / "run", "--micro-batch-size", "4")
        return [
            refusal(words(data, *flags, "--dump-selection", tmp_path / "dump")),
            refusal(words(data, *flags, "--metrics-file", tmp_path / "m.jsonl")),
        ]

    first, second = run_ranks(2, fn)
    other.kill()
    other.join()
    assert first == second
    for flag, text in zip(("--dump-selection", "--metrics-file"), first, strict=True):
        assert text.startswith(f"{flag} {tmp_path}"), text
        assert f"is being written by process {other.pid} on " in text
    # What was taken before the refusal is given back.
    assert not [*(tmp_path / "run").iterdir()]


def test_weights_that_are_not_finite_do_not_take_the_place_of_good_ones(
    data: list[str], tmp_path: Path
) -> None:
    def fn(rank: int) -> tuple[str, bool]:
        def spoil(trainer: Trainer) -> None:
            step = trainer.engine.step

            def spoiled(*args):
                outcome = step(*args)
                if trainer.state.iteration == 2 and rank == 1:
                    trainer.engine.model.blocks["2"].mlp.up.bias.data[3] = float("nan")
                return outcome

            trainer.engine.step = spoiled

        flags = ("--save", tmp_path / "run", "--save-interval", 1, "--keep-last", 1)
        pp = ("--pipeline-model-parallel-size", 2, "--zero-stage", 0)
        return stopped(words(data, *flags, *pp), spoil, None), (tmp_path / "run" / ".lock").exists()

    (text, locked), (same, _) = run_ranks(2, fn)
    assert text == same and not locked
    assert "weight/blocks.2.mlp.up.bias has values that are not finite" in text
    assert "earlier ones are untouched" in text and "(on rank 1)" in text
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["iter_0000002"]
    assert not [*(tmp_path / "run").glob(".*")]


def test_what_could_not_be_read_back_is_not_published(data: list[str], tmp_path: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        trainer.state.tokens = -(10**9)

    argv = words(data, "--save", tmp_path / "run", iters=2)
    (text,) = run_ranks(1, lambda rank: stopped(argv, spoil, None))
    assert "state.json has invalid contents: tokens: input should be greater than" in text
    assert [p.name for p in (tmp_path / "run").iterdir()] == []


def test_a_validation_loss_that_is_not_finite_is_no_best_one(data: list[str]) -> None:
    from megatron_eslm.training import callbacks

    class Watch(Callback):
        def __init__(self) -> None:
            self.best: list[float | None] = []

        def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
            self.best.append(trainer.state.best_valid_loss)

    def fn(rank: int) -> list[float | None]:
        watch, losses = Watch(), iter([float("nan"), 3.0, float("inf"), 2.0])
        callbacks.evaluate = lambda *_: Evaluation(next(losses), {})

        def hang_in(trainer: Trainer) -> None:
            trainer.callbacks = [watch, *trainer.callbacks]

        train(words(data, "--eval-interval", "1", iters=3), None, hang_in)
        return watch.best

    assert run_ranks(1, fn)[0] == [None, 3.0, 3.0, 2.0]
