"""Starts over several launchers and by MPI: 20 steps of ESLM here, as one process has them.

Each way is a list of commands to run at once, which stand for the machines. An `srun` is what it
makes of a process: its variables.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ..launch.ranks import free_port
from .runs import ROWS, read_metrics, words
from .test_command_line import BIN, PYTHON, SCRIPT, assert_nothing_left, errors, start, stop

pytestmark = pytest.mark.slow

STEPS = 20
MICRO_BATCH = ("--micro-batch-size", str(ROWS // 2))
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1x1x2": (2, MICRO_BATCH),
    "2x2x2": (
        8,
        (
            *MICRO_BATCH,
            *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
        ),
    ),
}
"""By TP x PP x DP: processes, and the flags that lay them out."""


def one_process(world_size: int) -> list[list[str]]:
    assert world_size == 1
    return [PYTHON]


def two_torchruns(world_size: int) -> list[list[str]]:
    port = free_port()
    here = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    return [
        [
            *(sys.executable, "-m", "torch.distributed.run", *here),
            *("--nnodes", "2", "--node-rank", str(node)),
            *("--nproc-per-node", str(world_size // 2), SCRIPT),
        ]
        for node in range(2)
    ]


def srun_tasks(world_size: int, changes: Mapping[str, str] = {}) -> list[list[str]]:
    job = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_NTASKS": str(world_size),
        **changes,
    }
    return [
        [
            "env",
            *(f"{name}={value}" for name, value in job.items()),
            *(f"SLURM_PROCID={rank}", f"SLURM_LOCALID={rank}", *PYTHON),
        ]
        for rank in range(world_size)
    ]


def mpirun(world_size: int) -> list[list[str]]:
    need_open_mpi()
    return [["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(world_size), *PYTHON]]


def deepspeed_openmpi(world_size: int) -> list[list[str]]:
    """On one machine, which has to be told that it is reached without ssh."""
    need_open_mpi()
    return [
        [
            *(str(BIN / "deepspeed"), "--launcher", "openmpi", "--hostfile", "hostfile"),
            *("--force_multi", "--no_ssh_check", "--master_addr", "127.0.0.1"),
            *("--launcher_args", "--oversubscribe --bind-to none --mca btl_tcp_if_include lo"),
            SCRIPT,
        ]
    ]


def need_open_mpi() -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (apt-get install openmpi-bin libopenmpi-dev)")
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    if "Open MPI" not in version:
        pytest.skip("mpirun is not Open MPI's")
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed (pip install '.[mpi]')")


def launch(commands: list[list[str]], *flags: str, cwd: Path) -> list[tuple[int, str]]:
    """Exit code and stderr of each command, run at once; nothing of them may be left."""
    processes = [start(command, *flags, cwd=cwd) for command in commands]
    try:
        texts = [process.communicate(timeout=300)[1] for process in processes]
        assert_nothing_left(cwd)
    finally:
        for process in processes:
            stop(process, cwd)
    return [(p.returncode, text) for p, text in zip(processes, texts, strict=True)]


def run_steps(
    commands: list[list[str]], data: list[str], cwd: Path, *flags: str
) -> list[dict[str, Any]]:
    """Metrics of every step of an ESLM run that these commands start."""
    metrics = cwd / "metrics.jsonl"
    argv = words(data, "--eslm-alpha", "0.1", "--metrics-file", metrics, *flags, iters=STEPS)
    ends = launch(commands, *argv, cwd=cwd)
    assert [code for code, _ in ends] == [0] * len(commands), ends
    # Rank 0 alone reports.
    reports = sum(len(re.findall(rf"iteration +{STEPS}/{STEPS} \| loss", err)) for _, err in ends)
    assert reports == 1, ends
    return [line for line in read_metrics(metrics) if line["iteration"] > 0]


@pytest.fixture(scope="module")
def alone(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of a single process."""
    return run_steps(one_process(1), data, tmp_path_factory.mktemp("alone"))


@pytest.fixture(autouse=True)
def _as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run tests as root, which Open MPI refuses unless told twice."""
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")


@pytest.mark.parametrize(
    ("way", "layout"),
    [
        (two_torchruns, "1x1x2"),
        (two_torchruns, "2x2x2"),
        (srun_tasks, "1x1x2"),
        (mpirun, "1x1x2"),
        (mpirun, "2x2x2"),
        (deepspeed_openmpi, "1x1x2"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_twenty_steps_are_those_of_one_process(
    way: Callable[[int], list[list[str]]],
    layout: str,
    data: list[str],
    alone: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    world_size, flags = LAYOUTS[layout]
    (tmp_path / "hostfile").write_text(f"localhost slots={world_size}\n")
    steps = run_steps(way(world_size), data, tmp_path, *flags)
    assert len(steps) == len(alone) == STEPS
    for ours, theirs in zip(steps, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        for name in ("kept_instances", "kept_tokens", "tokens", "tokens_trained"):
            assert ours[name] == theirs[name]
        assert theirs["kept_instances"] < 1 and theirs["kept_tokens"] < 1
    assert steps[-1]["valid_loss"] == pytest.approx(alone[-1]["valid_loss"], abs=1e-5)


def test_bad_input_ends_a_job_of_mpi_with_one_message(tmp_path: Path) -> None:
    ((code, err),) = launch(mpirun(2), "--eslm-alhpa", "0.1", cwd=tmp_path)
    assert code == 2, err
    assert errors(err) == ["error: There is no option --eslm-alhpa. Did you mean --eslm-alpha?"]
    assert "Traceback" not in err


def test_tasks_that_cannot_look_up_the_first_machine_say_what_to_export(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho no-such-host\n")
    scontrol.chmod(0o755)
    changes = {
        "MASTER_ADDR": "",
        "SLURM_STEP_NODELIST": "no-such-host,another",
        "SLURM_STEP_NUM_NODES": "2",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    for code, err in launch(srun_tasks(2, changes), cwd=tmp_path):
        assert code == 2, err
        (message,) = errors(err)
        assert "MASTER_ADDR no-such-host, is not known on" in message
        assert "Export MASTER_ADDR" in message
