from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.bootstrap import init_distributed, single_process

from ..harness import run_ranks


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


def test_importing_the_package_is_silent_and_light() -> None:
    code = (
        "import sys, megatron_eslm, megatron_eslm.parallel.bootstrap;"
        "heavy = {'deepspeed', 'megatron.core', 'apex', 'mpi4py'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


LEAVES = """
import atexit
from megatron_eslm.parallel.bootstrap import leave

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
