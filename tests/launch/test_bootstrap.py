from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.bootstrap import init_distributed, quiet_imports, single_process
from megatron_eslm.parallel.meeting import Meeting
from megatron_eslm.watchdog.phases import Phases
from megatron_eslm.watchdog.watchdog import job_watchdog

from ..harness import run_ranks
from .ranks import Ranks, environment, free_port


def test_single_process_makes_a_group_and_takes_it_away() -> None:
    with single_process():
        assert dist.get_world_size() == 1
        with single_process():  # the group that exists is used, and left to its maker
            assert dist.get_world_size() == 1
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_an_incomplete_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"sets RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_A"):
        init_distributed()
    assert not dist.is_initialized()


def test_init_distributed_takes_the_group_that_a_launcher_described() -> None:
    def on_rank(rank: int) -> tuple[str, int]:
        return str(init_distributed()), dist.get_world_size()

    assert run_ranks(2, on_rank) == [("cpu", 2)] * 2


def test_without_a_launcher_there_is_one_process() -> None:
    def on_rank(rank: int) -> tuple[str, int, str]:
        dist.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
        device = init_distributed()
        x = torch.ones(1)
        dist.all_reduce(x)
        return str(device), dist.get_world_size(), os.environ["RANK"]

    assert run_ranks(1, on_rank) == [("cpu", 1, "0")]


def all_reduced(meeting: Meeting) -> float:
    """Sum over the ranks, of which the second comes later than ranks may take to connect."""
    init_distributed(60.0, meeting=meeting, connect_seconds=1.0)
    if meeting.rank == 1:
        time.sleep(1.5)
    x = torch.ones(1)
    dist.all_reduce(x)
    dist.barrier()
    return x.item()


def watched(meeting: Meeting) -> None:
    """Rank 1 dies between the meeting and the connection of all with all."""
    watchdog = job_watchdog(meeting, Phases(), 60.0)
    assert watchdog is not None
    if meeting.rank == 1:
        while watchdog._client.num_exchanges < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    init_distributed(meeting=meeting, connect_seconds=30.0)


def stopped(meeting: Meeting) -> None:
    if meeting.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    init_distributed(meeting=meeting, connect_seconds=1.0)


@pytest.mark.timeout(60)
def test_ranks_that_have_met_connect_within_a_limit_or_say_why(
    ranks: Ranks, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_imports()
    jobs = {}
    for name, work, more in (
        ("all", all_reduced, {}),
        ("one stopped", stopped, {}),
        ("one dead", watched, {}),
        ("no interface", stopped, {"GLOO_SOCKET_IFNAME": "none0"}),
    ):
        port = free_port()
        jobs[name] = [
            ranks.start(environment(rank, 2, port, **more), work=work) for rank in range(2)
        ]
    assert [ranks.said(pid) for pid in jobs["all"]] == [2.0, 2.0]
    connects = (
        f"ConfigError: rank 0 (host {socket.gethostname()}) cannot connect to all other ranks ("
    )
    message = ranks.said(jobs["one stopped"][0])
    assert message.startswith(f"{connects}wait timeout after 1000ms")
    assert message.endswith("set GLOO_SOCKET_IFNAME.")
    message = ranks.said(jobs["no interface"][0])
    assert message.startswith(connects) and "Unable to find address for: none0" in message
    assert ranks.said(jobs["one dead"][0]) is None
    died = f'error: rank 1 (host {socket.gethostname()}, pid {jobs["one dead"][1]}) died in "start"'
    assert died in capfd.readouterr().err


def test_importing_the_package_is_silent_and_light() -> None:
    code = (
        "import sys, megatron_eslm, megatron_eslm.launch.bootstrap;"
        "heavy = {'deepspeed', 'megatron.core', 'apex', 'mpi4py'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


LEAVES = """
import atexit
from megatron_eslm.launch.bootstrap import leave

class Left:
    def __del__(self):
        print("the interpreter's own end")

atexit.register(print, "at exit", end="")
left = Left()
leave(7)
"""


def test_leaving_says_all_and_ends_without_the_interpreters_end() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "at exit", "")
