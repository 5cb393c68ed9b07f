"""Whole jobs under their launchers, of which one rank is killed or stopped in the middle."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

from .runs import read_metrics, words
from .test_command_line import (
    DEEPSPEED,
    TORCHRUN,
    assert_nothing_left,
    errors,
    process_of_rank,
    run,
    start,
    stop,
    wait_for_iteration,
)

ENDS = "The job ends; start it again with --load to continue from the last checkpoint."
ITERS = 40


def flags(data: list[str], folder: Path, *more: str | int | float | Path) -> list[str]:
    """Two pipeline stages with loaders of their own."""
    fixed = ("--pipeline-model-parallel-size", 2, "--num-workers", 1, "--global-batch-size", 32)
    fixed += ("--eslm-alpha", 0.2)  # three of four micro-steps
    metrics = ("--metrics-file", folder / "m.jsonl")
    return words(data, *fixed, *metrics, *more, iters=ITERS, micro_batch_size=8)


ENDLESS = ("--train-iters", 100_000, "--max-epochs", 1_000_000)


def strike(
    command: list[str], argv: list[str], folder: Path, number: signal.Signals, rank: int
) -> tuple[int, str, str]:
    """Start a job, send a signal to one rank in the middle, and wait for the end of all processes.

    Returns:
        Exit code, stderr, and how the message has to begin.
    """
    process = start(command, *argv, cwd=folder)
    try:
        wait_for_iteration(process, folder / "m.jsonl", 3)
        pid = process_of_rank(folder, rank)
        os.kill(pid, number)
        _, err = process.communicate(timeout=100)
        assert_nothing_left(folder)
    finally:
        stop(process, folder)
    return process.returncode, err, f"error: rank {rank} (host {socket.gethostname()}, pid {pid}) "


def the_error(err: str) -> tuple[str, int]:
    """The message of the job, of which there is one, and the iteration that it names."""
    (error,) = errors(err)
    found = re.search(r' "[a-z0-9 ]+" of iteration (\d+)', error)
    assert found and error.endswith(ENDS), error
    # Nothing else was said by a rank; torchrun has a traceback of its own.
    assert "Traceback" not in err[: err.index(error)]
    return error, int(found[1])


def test_a_killed_stage_ends_the_job_which_then_resumes_exactly(
    data: list[str], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    code, _, err = run(TORCHRUN, *flags(data, whole), cwd=whole)
    assert code == 0, err

    save = ("--save", broken / "run", "--load", broken / "run", "--save-interval", 1)
    argv = flags(data, broken, *save)
    code, err, who = strike(TORCHRUN, argv, broken, signal.SIGKILL, 1)
    assert code == 1
    error, iteration = the_error(err)
    assert error.startswith(f"{who}died in ")
    # The step under way, or its end.
    done = read_metrics(broken / "m.jsonl")[-1]["iteration"]
    assert done <= iteration <= done + 1 < ITERS

    code, _, err = run(TORCHRUN, *argv, cwd=broken)
    assert code == 0, err
    assert "continuing from" in err
    theirs = {line["iteration"]: line for line in read_metrics(whole / "m.jsonl")}
    ours = {line["iteration"]: line for line in read_metrics(broken / "m.jsonl")}
    assert ours.keys() == theirs.keys() == set(range(ITERS + 1))
    for i in range(ITERS + 1):
        for key in ("loss", "valid_loss", "tau_token", "kept_tokens"):
            assert ours[i][key] == theirs[i][key], (i, key)


def test_a_killed_rank_zero_takes_the_store_with_it(data: list[str], tmp_path: Path) -> None:
    argv = flags(data, tmp_path, *ENDLESS)
    code, err, who = strike(DEEPSPEED, argv, tmp_path, signal.SIGKILL, 0)
    assert code != 0
    error, iteration = the_error(err)
    assert error.startswith(f"{who}died in ") and iteration >= 4


def test_a_stopped_stage_ends_the_job(data: list[str], tmp_path: Path) -> None:
    argv = flags(data, tmp_path, *ENDLESS, "--distributed-timeout-minutes", 0.1)
    code, err, who = strike(TORCHRUN, argv, tmp_path, signal.SIGSTOP, 1)
    assert code == 1
    error, iteration = the_error(err)
    assert error.startswith(f"{who}has not answered for 3 s, stopped by a signal; last seen in ")
    assert iteration >= 4


HANGS = """
import os, time
from megatron_eslm.engine.engine import Engine
from megatron_eslm.training.main import main

step = Engine.step

def step_or_hang(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.phases.iteration == 4:
        with self.phases("a loop without end"):
            time.sleep(1000)
    return step(self, *args, **kwargs)

Engine.step = step_or_hang
main()
"""


def test_a_stage_that_hangs_ends_the_job(data: list[str], tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    argv = flags(data, tmp_path, *ENDLESS, "--distributed-timeout-minutes", 0.1)
    code, _, err = run([*TORCHRUN[:-1], str(script)], *argv, cwd=tmp_path)
    assert code == 1
    error, iteration = the_error(err)
    assert iteration == 4
    assert re.search(
        r'has been in "a loop without end" of iteration 4 for \d+ s, and no rank went on '
        r'\(--distributed-timeout-minutes 0\.1\); rank 0 (waiting )?in "[a-z0-9 ]+" of',
        error,
    )


KILLED = """
import os, signal
from megatron_eslm.model.early_exit import EarlyExit
from megatron_eslm.training.main import main

scores = EarlyExit.candidate_scores

def die(self, *args):
    if os.environ["RANK"] == "1" and self.policy.state.iteration == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return scores(self, *args)

EarlyExit.candidate_scores = die
main()
"""


def test_a_rank_that_dies_in_the_proxy_pass_is_named_there(data: list[str], tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    steps = ("--global-batch-size", 32, "--eslm-scope", "step", "--eslm-alpha", 0.2)
    argv = words(data, *steps, micro_batch_size=4)
    code, _, err = run([*TORCHRUN[:-1], str(script)], *argv, cwd=tmp_path)
    assert code == 1
    error, iteration = the_error(err)
    assert 'died in "proxy pass" of iteration 3' in error and "rank 1 " in error
    assert iteration == 3
