"""By what a rank knows which job it belongs to."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_eslm.launch.attendee import Attendee, job_name
from megatron_eslm.launch.launchers import described
from megatron_eslm.watchdog.process import Process

RANK_1_OF_2 = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_it_arrives_as_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", RANK_1_OF_2)
    launch = described()
    assert launch is not None
    one, two = Attendee.of(launch, None), Attendee.of(launch, None)
    assert Attendee.decode(one.encode()) == one != two
    assert one.who == f"rank 1 (host {one.process.host}, pid {os.getpid()})"


def test_the_name_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    base = RANK_1_OF_2
    here = Process("node1", 7, "place", 1)
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"}
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "PMIX_NAMESPACE": "99"}
    for more, pid, name in (
        ({}, None, ""),
        ({}, 4, ""),
        ({"LOCAL_SIZE": "1"}, 4, ""),
        ({"LOCAL_SIZE": "2"}, 4, "launcher 4 on node1"),
        ({**torchrun, "LOCAL_WORLD_SIZE": "2"}, 4, "torchrun x, launcher 4 on node1"),
        ({**torchrun, **srun, "SLURM_PROCID": "1"}, 4, "torchrun x"),
        ({**srun, "SLURM_PROCID": "1"}, None, "Slurm 5.0"),
        # An allocation in which ranks were numbered by hand.
        ({**srun, "SLURM_PROCID": "0"}, None, ""),
        ({**srun, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "1"}, None, ""),
        (mpi, None, "MPI 99"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {**base, **more})
            launch = described()
            assert launch is not None
            by: Any = SimpleNamespace(common_pid=pid)
            assert job_name(launch, by, here) == name
