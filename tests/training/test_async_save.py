"""Checkpoints that are written while training goes on: the same files, errors, order and ends."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.checkpoint import tensor_files
from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.host_copies import HostCopies
from megatron_eslm.checkpoint.manifest import files_of, list_checkpoints
from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.tensor_shares import gather_share
from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.memory import copy_bytes
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import plan_stages
from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.state import SelectionState
from megatron_eslm.training import run_data
from megatron_eslm.training.loop import Callback, Trainer
from megatron_eslm.training.nonfinite import NonfiniteError
from tests.harness import RankFailed, run_ranks

from .runs import VOCAB_SIZE, build, train, words
from .test_command_line import TORCHRUN, run
from .test_watchdog import ENDLESS, flags, the_error

WAITS = "writing checkpoint files"
"""Phase in which the main thread waits for its thread of files."""


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for another thread; fail where that would be for ever."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.001)


def before_each_write(do: Callable[[int], None]) -> None:
    """Call `do(iteration)` before this rank of a test writes tensors."""
    write_file = tensor_files.write_file

    def patched(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
        do(int(metadata["iteration"]))
        write_file(path, tensors, metadata)

    tensor_files.write_file = patched


def write_a_step_late(trainer: Trainer) -> None:
    """Let no file be written before training has gone on, where it does not wait."""
    last = trainer.run.training.train_iters

    def hold(iteration: int) -> None:
        if iteration < last:
            until(lambda: trainer.state.iteration > iteration, "the next step is made")

    before_each_write(hold)


LAYOUTS = {
    "zero0": ("--zero-stage", 0),
    "zero2": ("--zero-stage", 2),
    "bf16-zero3": ("--bf16", "--zero-stage", 3),
    "tp2-bf16": ("--tensor-model-parallel-size", 2, "--bf16"),
    "pp2": ("--pipeline-model-parallel-size", 2),
    "lora": ("--lora-rank", 2),
}
"""Float32 masters as parameters, in flat partitions, per parameter; frozen weights."""


def test_the_contents_are_those_of_a_save_that_is_waited_for(
    data: list[str], start: Path, tmp_path: Path
) -> None:
    """To the bit, though the next step has changed weights and moments before they are written."""

    def fn(rank: int) -> None:
        run_data.new_run_id = lambda: "0" * 32  # type: ignore[assignment]
        for name, layout in LAYOUTS.items():
            model = ("--load", start / "weights") if name == "lora" else ()
            rows = 8 if "model-parallel" in str(layout) else 4
            for kind in KINDS:
                save = ("--save", tmp_path / kind / name, "--save-interval", 2, f"--{kind}")
                argv = (*layout, *save, *model, "--eslm-alpha", "0.3", "--eval-iters", 0)
                prepare = write_a_step_late if kind == KINDS[0] else None
                train(words(data, *argv, iters=3, micro_batch_size=rows), prepare=prepare)

    run_ranks(2, fn)
    for name in LAYOUTS:
        for iteration in ("iter_0000002", "iter_0000003"):
            ours, theirs = (contents(tmp_path / kind / name / iteration) for kind in KINDS)
            assert ours.keys() == theirs.keys()
            for file in ours:
                assert ours[file] == theirs[file], (name, iteration, file)


def test_the_memory_of_the_copies_is_in_the_estimate(data: list[str]) -> None:
    def fn(rank: int, flags: tuple) -> int:
        trainer = build(words(data, *flags, "--selection", "clm"))
        copies = HostCopies()
        gather_share(trainer.engine, OptimizerState(trainer.engine), VOCAB_SIZE, copies.hold)
        return copies.num_bytes

    for name in ("zero2", "pp2"):
        held = run_ranks(2, fn, LAYOUTS[name])
        run = parse_run(words(data, *LAYOUTS[name], "--selection", "clm"), 2)
        shape = replace(run.shape(VOCAB_SIZE), padded_vocab_size=VOCAB_SIZE)
        plan = plan_stages(
            run, shape, build_flops(run, shape, SelectionState(alpha=0.0)), step_work(run)
        )
        # So few parameters cannot be dealt out evenly.
        assert copy_bytes(run, shape, plan) == pytest.approx(max(held), rel=0.1), name


KINDS = ("async-save", "no-async-save")


def contents(folder: Path) -> dict[str, object]:
    """Files of a checkpoint, without what two runs have of their own."""
    find_checkpoint(folder)
    found: dict[str, object] = {}
    for name in files_of(folder):
        data = (folder / name).read_bytes()
        if name.endswith(".safetensors"):  # the order of its metadata varies
            size = 8 + int.from_bytes(data[:8], "little")
            found[name] = json.loads(data[8:size]), data[size:]
        elif name == "state.json":
            found[name] = {**json.loads(data), "elapsed_seconds": 0}
        elif name == "run.json":
            values = json.loads(data)
            for key in ("save", "async_save"):
                del values["options"]["checkpoint"][key]
            found[name] = values
        else:
            found[name] = data
    return found


class Complete(Callback):
    """Notes which checkpoint became complete after which iteration."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        assert (folder / "manifest.json").exists()
        self.seen.append((folder.name, trainer.state.iteration))


def test_one_at_a_time_and_old_ones_stay_until_the_new_one_is_complete(
    data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save = tmp_path / "run"

    def fn(rank: int) -> tuple[list, list[list[str]], str]:
        complete, there = Complete(), []

        def prepare(trainer: Trainer) -> None:
            trainer.callbacks = [*trainer.callbacks, complete]

            def hold(iteration: int) -> None:
                # Until the save after this one waits for it.
                until(lambda: trainer.phases.now.phase == WAITS, "the next save waits")
                there.append([p.name for p in list_checkpoints(save)])

            before_each_write(hold)

        with caplog.at_level(logging.INFO):
            flags = ("--save", save, "--save-interval", 1, "--keep-last", 1, "--eval-iters", 0)
            train(words(data, *flags, iters=3), prepare=prepare)
        return complete.seen, there, caplog.text

    ((seen, there, log),) = run_ranks(1, fn)
    one, two, three = (f"iter_000000{n}" for n in (1, 2, 3))
    assert seen == [(one, 2), (two, 3), (three, 3)]
    assert there == [[], [one], [two]]
    assert f"saving iteration 2 waits until {save / one} is written" in log
    assert [p.name for p in save.iterdir()].count(three) == 1 and not [*save.glob("*.saving-*")]


def test_an_error_ends_all_ranks_at_the_next_step(data: list[str], tmp_path: Path) -> None:
    """Also where the other rank has not written its own files yet."""
    save = tmp_path / "run"

    def fn(rank: int) -> tuple[str, int]:
        trainers: list[Trainer] = []

        def prepare(trainer: Trainer) -> None:
            trainers.append(trainer)

            def fail(iteration: int) -> None:
                if iteration == 4 and rank == 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                if iteration == 4:
                    until(lambda: trainer.phases.now.phase == WAITS, "the error is known")

            before_each_write(fail)

        flags = ("--save", save, "--save-interval", 2, "--zero-stage", 1, "--eval-iters", 0)
        with pytest.raises(ConfigError) as caught:
            train(words(data, *flags, iters=50, micro_batch_size=4), prepare=prepare)
        return str(caught.value), trainers[0].state.iteration

    (text, iteration), same = run_ranks(2, fn)
    assert (text, iteration) == same and iteration in (5, 6)
    file = save / "iter_0000004" / "tensors_00001.safetensors"
    assert text == (
        f"--save {file}: No space left on device. The checkpoint was not written; earlier ones are "
        "untouched. (on rank 1)"
    )
    assert sorted(p.name for p in save.iterdir()) == ["iter_0000002", "latest"]


def test_a_run_that_ends_in_nonfinite_steps_completes_its_checkpoint(
    data: list[str], tmp_path: Path
) -> None:
    save = tmp_path / "run"

    def prepare(trainer: Trainer) -> None:
        before_each_write(
            lambda iteration: until(lambda: trainer.phases.now.phase == WAITS, "the run ends")
        )
        step = trainer.engine.step

        def spoiled(*args):
            if trainer.state.iteration == 2:
                trainer.engine.model.blocks["1"].mlp.up.bias.data[3] = float("nan")
            return step(*args)

        trainer.engine.step = spoiled

    def fn(rank: int) -> None:
        flags = ("--save", save, "--save-interval", 2, "--max-nonfinite-steps", 1)
        with pytest.raises(NonfiniteError):
            train(words(data, *flags, "--eval-iters", 0), prepare=prepare)

    run_ranks(1, fn)
    assert find_checkpoint(save).state().iteration == 2


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)], ids=["0", "1", "both"])
def test_a_run_that_ends_in_any_error_completes_its_checkpoint(
    data: list[str], tmp_path: Path, failing: tuple[int, ...]
) -> None:
    """Also where one rank fails alone, while the other one waits for it in a collective."""
    save = tmp_path / "run"

    class Fails(Callback):
        def on_step(self, trainer: Trainer, step: object) -> None:
            if trainer.state.iteration == 3 and dist.get_rank() in failing:
                raise RuntimeError("of its own")

    def fn(rank: int) -> None:
        def prepare(trainer: Trainer) -> None:
            trainer.callbacks = [Fails(), *trainer.callbacks]
            # Nothing is written before a rank has failed.
            waits = {3} if rank not in failing else set()

            def fails() -> bool:
                return trainer.phases.now.phase == WAITS or trainer.state.iteration in waits

            before_each_write(lambda iteration: until(fails, "the run fails"))

        flags = ("--save", save, "--save-interval", 2, "--zero-stage", 1, "--eval-iters", 0)
        argv = words(data, *flags, micro_batch_size=4)
        if rank in failing:
            with pytest.raises(RuntimeError, match="of its own"):
                train(argv, prepare=prepare)
            (tmp_path / "left").touch()
            return os._exit(0)  # as at the end of a job: without waiting for the other
        with contextlib.suppress(Exception):
            train(argv, prepare=prepare)

    with pytest.raises(RankFailed):
        run_ranks(2, fn, timeout=60.0)
    assert (tmp_path / "left").exists()
    assert find_checkpoint(save).state().iteration == 2
    assert not [*save.glob(".saving-*")]


def test_a_checkpoint_that_cannot_be_completed_does_not_hide_the_error(
    data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save = tmp_path / "run"

    def fail(iteration: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def prepare(trainer: Trainer) -> None:
        def end(state: object) -> None:
            until(lambda: trainer.callbacks[-1]._saver._save.stages[0][0].done(), "it has failed")
            raise RuntimeError("of its own")

        trainer.alpha.end_step = lambda iteration, *more: iteration == 2 and end(iteration)
        before_each_write(fail)

    def fn(rank: int) -> str:
        flags = ("--save", save, "--save-interval", 2, "--eval-iters", 0)
        with pytest.raises(RuntimeError, match="of its own"):
            train(words(data, *flags), prepare=prepare)
        return caplog.text

    assert "No space left on device" in run_ranks(1, fn)[0]
    assert list_checkpoints(save) == [] and not [*save.glob(".saving-*")]
    assert not (save / ".lock").exists()


HANGS = """
import os, time
from megatron_eslm.checkpoint import tensor_files
from megatron_eslm.training.main import main

write_file = tensor_files.write_file

def hang(*args):
    time.sleep(1000 if os.environ["RANK"] == "1" else 0)
    write_file(*args)

tensor_files.write_file = hang
main()
"""


@pytest.mark.slow  # 20 s, most of it start and timeout
def test_a_disk_that_hangs_is_named_with_its_rank(data: list[str], tmp_path: Path) -> None:
    """At the next save, which waits for it; until then training goes on."""
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    more = ("--save", tmp_path / "run", "--save-interval", 4, "--distributed-timeout-minutes", 0.1)
    argv = flags(data, tmp_path, *ENDLESS, *more, "--eval-iters", 0)
    code, _, err = run([*TORCHRUN[:-1], str(script)], *argv, cwd=tmp_path)
    assert code == 1
    error, iteration = the_error(err)
    assert iteration == 8 and f'has been in "{WAITS}" of iteration 8' in error
    assert error.startswith("error: rank 1 (")


def test_copies_keep_what_was_and_their_memory() -> None:
    copies, tensor = HostCopies(), torch.arange(6.0).view(2, 3)
    first = copies.hold("weight/a", tensor.t())
    copies.wait()
    tensor.zero_()
    assert first.is_contiguous() and first.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    second = copies.hold("weight/a", tensor.t())
    assert second.data_ptr() == first.data_ptr() and not second.any()
    assert copies.hold("weight/b", tensor).data_ptr() != first.data_ptr()


def test_copies_do_without_pinned_memory_and_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty, asked = torch.empty, []

    def refused(*args: object, pin_memory: bool = False, **more: object) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return empty(*args, **more)

    class OnCuda(torch.Tensor):
        is_cuda = True

    tensor = torch.arange(6.0).as_subclass(OnCuda)
    monkeypatch.setattr(torch, "empty", refused)
    copies = HostCopies()
    held = [copies.hold(name, tensor).tolist() for name in ("weight/a", "weight/b", "weight/a")]
    assert held == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 3
    assert asked == [True, False, False]  # once is enough
    (record,) = caplog.records
    assert "(CUDA error: out of memory): the others are pageable" in record.getMessage()


def test_no_memory_for_copies_is_an_error_that_says_what_to_do(monkeypatch) -> None:
    def refused(*args: object, **more: object) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    copies, tensor = HostCopies(), torch.zeros(2**20)
    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(ConfigError, match=r"copy of 4.0 MiB after 0.0 GiB \(can't .*--no-async"):
        copies.hold("weight/a", tensor)
