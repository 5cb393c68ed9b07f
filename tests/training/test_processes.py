"""Whole jobs of which the launcher or a loader is killed or stopped: no process of them is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..launch.ranks import connections, free_port
from .runs import read_metrics, words
from .test_command_line import (
    DEEPSPEED,
    PYTHON,
    TORCHRUN,
    assert_nothing_left,
    errors,
    members,
    start,
    stop,
    wait_for_iteration,
)

LAUNCHER = """
import os, subprocess, sys
subprocess.run(sys.argv[1:], env={**os.environ, **dict(
    RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="%s")})
"""
ENDLESS = ("--train-iters", 100_000, "--max-epochs", 1_000_000)


def wait_for_ranks(process: subprocess.Popen, folder: Path, num: int) -> None:
    while len({env.get("RANK") for env in members(folder).values()} - {None}) < num:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.timeout(120)
def test_ranks_that_have_not_met_end_with_their_launcher(data: list[str], tmp_path: Path) -> None:
    """It is killed at once, while they import, and while they wait for one that never comes."""
    jobs = []
    argv = words(data, iters=3)
    try:
        for moment in ("torchrun", "at once", "imports", "waits"):
            folder = tmp_path / moment.replace(" ", "-")
            folder.mkdir()
            port = free_port()
            command = [sys.executable, "-c", LAUNCHER % port, *PYTHON]
            command = TORCHRUN if moment == "torchrun" else command
            jobs.append((start(command, *argv, cwd=folder), folder, moment, port))
        for process, folder, moment, port in jobs:
            wait_for_ranks(process, folder, 2 if moment == "torchrun" else 1)
            if moment == "imports":
                time.sleep(0.5)
            while moment == "waits" and connections(port) < 1:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.05)
            process.kill()
        for process, folder, moment, _ in jobs:
            assert_nothing_left(folder)
            _, err = process.communicate()
            assert "Traceback" not in err
            if moment != "torchrun":
                assert re.search(rf"\(pid {process.pid}\), which started this job, has ended", err)
    finally:
        for process, folder, _, _ in jobs:
            stop(process, folder)


def test_a_stopped_loader_ends_a_run_of_one_process(data: list[str], tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    more = ("--metrics-file", metrics, "--num-workers", 1, "--distributed-timeout-minutes", 0.05)
    process = start(PYTHON, *words(data, *ENDLESS, *more), cwd=tmp_path)
    try:
        wait_for_iteration(process, metrics, 1)
        (loader,) = set(members(tmp_path)) - {process.pid}
        os.kill(loader, signal.SIGSTOP)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        (text,) = errors(err)
        assert f"(pid {loader}), which was to deliver samples " in text
        assert "has been stopped by a signal for " in text and "Traceback" not in err
        assert_nothing_left(tmp_path)
    finally:
        stop(process, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_training_ends_with_its_launcher(
    command: list[str], data: list[str], tmp_path: Path
) -> None:
    """Under deepspeed with a checkpoint; torchrun takes the job's store with it."""
    metrics = tmp_path / "m.jsonl"
    more = ("--metrics-file", metrics, "--save", tmp_path / "run", "--num-workers", 1)
    argv = words(data, *ENDLESS, *more, micro_batch_size=4)
    process = start(command, *argv, cwd=tmp_path)
    try:
        wait_for_iteration(process, metrics, 3)
        process.kill()
        # DeepSpeed's own process of this machine looks at its ranks once a second.
        assert_nothing_left(tmp_path, seconds=30)
        _, err = process.communicate()
        assert f"(pid {process.pid}), which started this job, has ended" in err
        if command is DEEPSPEED:
            (folder,) = (tmp_path / "run").glob("iter_*")
            assert f"iteration {int(folder.name[5:])}" in err
    finally:
        stop(process, tmp_path)


@pytest.mark.slow
def test_torchrun_restarts_a_job_which_continues(data: list[str], tmp_path: Path) -> None:
    """Both attempts use one store, in which the first has left its addresses and its verdict."""
    metrics, save, iters = tmp_path / "m.jsonl", tmp_path / "run", 40
    more = ("--metrics-file", metrics, "--save", save, "--load", save, "--save-interval", 1)
    argv = words(data, *more, iters=iters, micro_batch_size=4)
    process = start([*TORCHRUN[:3], "--max-restarts", "1", *TORCHRUN[3:]], *argv, cwd=tmp_path)
    try:
        wait_for_iteration(process, metrics, 3)
        second = [pid for pid, env in members(tmp_path).items() if env.get("RANK") == "1"]
        os.kill(min(second), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "Signal 9 (SIGKILL)" in err or "exitcode: -9" in err
        assert "continuing from" in err
        # The step under way may come twice.
        assert {line["iteration"] for line in read_metrics(metrics)} == set(range(iters + 1))
        assert_nothing_left(tmp_path)
    finally:
        stop(process, tmp_path)
