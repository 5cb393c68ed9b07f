"""Environments as the launchers make them: recorded from Open MPI 4.1, MPICH 4.0, Slurm 22.05."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.launchers import discover

FIVE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[3-4]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = {
    **BATCH_SCRIPT,
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
}
MASTER = {"MASTER_ADDR": "127.0.0.5", "MASTER_PORT": "1234"}

Launched = Callable[..., dict[str, str]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launched:
    """Call discover() in an environment and return what it holds of the five then.

    Only `scontrol` of a test's own is found, and host names resolve if they begin with node.
    """

    def resolve(host: str, port: object) -> list[object]:
        host.encode("idna")
        if host.startswith(("node", "127.")):
            return []
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def call(*parts: dict[str, str], without: tuple[str, ...] = ()) -> dict[str, str]:
        environment: dict[str, str] = {"PATH": str(tmp_path)}
        for part in parts:
            environment |= part
        for name in without:
            del environment[name]
        monkeypatch.setattr(os, "environ", environment)
        discover()
        return {name: environment[name] for name in FIVE if name in environment}

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "gethostname", lambda: "node9")
    return call


@pytest.fixture
def refused(launched: Launched) -> Callable[..., str]:
    """The message with which an environment is refused."""

    def call(*parts: dict[str, str], without: tuple[str, ...] = ()) -> str:
        with pytest.raises(ConfigError) as caught:
            launched(*parts, without=without)
        return str(caught.value)

    return call


class FakeMPI(ModuleType):
    """An mpi4py whose rank 0 says `said`, and which notes what is called."""

    def __init__(self, size: int, said: tuple[str, int] | None = None) -> None:
        super().__init__("mpi4py")
        self.calls: list[object] = []
        self.rc = SimpleNamespace(initialize=True, finalize=True)
        self.MPI = SimpleNamespace(
            Init=lambda: self.calls.append(("Init", self.rc.initialize, self.rc.finalize)),
            Finalize=lambda: self.calls.append("Finalize"),
            COMM_WORLD=SimpleNamespace(Get_size=lambda: size, bcast=self._bcast),
        )
        self.said = said

    def _bcast(self, mine: tuple[str, int], root: int) -> tuple[str, int]:
        assert root == 0
        self.calls.append(mine)
        return self.said or mine


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeMPI]:
    def install(size: int, said: tuple[str, int] | None = None) -> FakeMPI:
        fake = FakeMPI(size, said)
        monkeypatch.setitem(sys.modules, "mpi4py", fake)
        return fake

    return install


@pytest.fixture
def scontrol(tmp_path: Path) -> Callable[[str], Path]:
    """Put a program `scontrol` on PATH that notes its arguments and runs `script`."""

    def install(script: str) -> Path:
        program, noted = tmp_path / "scontrol", tmp_path / "noted"
        program.write_text(f'#!/bin/sh\necho "$@" >{noted}\n{script}\n')
        program.chmod(0o755)
        return noted

    return install


# What is not touched.


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "node1"},
        BATCH_SCRIPT,
        # A shell inside an allocation, as an interactive step.
        {**SRUN, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        # srun --mpi=pmi2 with one task.
        {
            **SRUN,
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
            "PMI_RANK": "0",
            "PMI_SIZE": "1",
        },
    ],
    ids=["shell", "address", "batch script", "interactive step", "one task"],
)
def test_a_plain_python_stays_one_process(launched: Launched, environment: dict[str, str]) -> None:
    assert launched(environment).keys() <= environment.keys()


def test_rank_and_world_size_that_are_set_win(launched: Launched) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}
    for launcher in (OPEN_MPI, MPICH, SRUN):
        assert launched(launcher, given) == given


# Slurm.


def test_srun(launched: Launched, scontrol: Callable[[str], Path]) -> None:
    noted = scontrol("echo node3; echo node4")
    found = launched(SRUN)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node3",
    }
    assert noted.read_text() == "show hostnames node[3-4]\n"
    assert port == 10_000 + (16 * 4711 + 2) % 20_000
    # Another rank finds the same port; another step and another job find others.
    others = ({"SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "3"}, {"SLURM_JOB_ID": "4712"})
    ports = [int(launched(SRUN, other)["MASTER_PORT"]) for other in others]
    assert ports[0] == port and len({port, *ports}) == 3
    # Far below where systems take the ports of outgoing connections from.
    assert all(10_000 <= p < 30_000 for p in ports)


def test_srun_on_the_hosts_of_its_step_or_job(
    launched: Launched, scontrol: Callable[[str], Path]
) -> None:
    noted = scontrol("echo node4")
    launched(SRUN, {"SLURM_STEP_NODELIST": "node[4-5]"})
    assert noted.read_text() == "show hostnames node[4-5]\n"
    launched(SRUN, without=("SLURM_STEP_NODELIST",))
    assert noted.read_text() == "show hostnames node[3-4]\n"


def test_srun_needs_no_scontrol_where_it_has_the_address(launched: Launched) -> None:
    assert launched(SRUN, MASTER) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        **MASTER,
    }
    assert launched(SRUN, {"MASTER_ADDR": "node7"})["MASTER_ADDR"] == "node7"
    assert launched(SRUN, {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"


def test_an_empty_address_is_none(launched: Launched, scontrol: Callable[[str], Path]) -> None:
    scontrol("echo node3")
    found = launched(SRUN, {"MASTER_ADDR": "", "MASTER_PORT": ""})
    assert found["MASTER_ADDR"] == "node3" and found["MASTER_PORT"].isdecimal()


def test_a_local_rank_that_is_set_wins(launched: Launched) -> None:
    """For jobs that show each task its own GPU only."""
    assert launched(SRUN, MASTER, {"LOCAL_RANK": "0"})["LOCAL_RANK"] == "0"


def test_srun_with_pmi2_is_srun(launched: Launched) -> None:
    assert launched(SRUN, MASTER, {"PMI_RANK": "5", "PMI_SIZE": "8"})["LOCAL_RANK"] == "1"


def test_half_of_what_srun_sets_is_refused(refused: Callable[..., str]) -> None:
    assert refused(SRUN, without=("SLURM_STEP_NUM_TASKS",)) == (
        "The environment sets SLURM_STEP_ID but not SLURM_STEP_NUM_TASKS, which srun sets. Unset "
        "SLURM_STEP_ID, or export RANK and WORLD_SIZE."
    )
    assert refused(SRUN, without=("SLURM_LOCALID",)) == (
        "The environment of srun sets SLURM_PROCID, SLURM_STEP_NUM_TASKS but not SLURM_LOCALID. "
        "Export LOCAL_RANK, or start with `deepspeed` or `torchrun`."
    )
    assert refused(SRUN, {"MASTER_ADDR": "node3"}, without=("SLURM_JOB_ID",)) == (
        "srun's environment does not set SLURM_JOB_ID, from which the port is derived. Export "
        "MASTER_PORT."
    )
    assert refused(SRUN, without=("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")) == (
        "srun's environment sets neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST, so the "
        "machine of rank 0 is not known. Export MASTER_ADDR."
    )


def test_a_job_submitted_from_inside_a_step_is_refused(refused: Callable[..., str]) -> None:
    """Its batch script remembers the step it was submitted from."""
    assert refused(SRUN, BATCH_SCRIPT, {"SLURM_NTASKS": "4"}) == (
        "SLURM_STEP_NUM_TASKS=8 contradicts SLURM_NTASKS=4: the variables were inherited "
        "from another Slurm step. Start this process with srun, or unset SLURM_STEP_ID."
    )


def test_no_scontrol(refused: Callable[..., str]) -> None:
    assert refused(SRUN) == (
        "scontrol is needed to expand SLURM_STEP_NODELIST=node[3-4] but is not installed here. Add "
        'to the batch script: export MASTER_ADDR="$(scontrol show hostnames '
        '"$SLURM_JOB_NODELIST" | head -n 1)"'
    )


def test_scontrol_that_fails(refused: Callable[..., str], scontrol: Callable[[str], Path]) -> None:
    scontrol("echo Invalid hostlist >&2; exit 1")
    assert "hostnames node[3-4]` names no machine: Invalid hostlist. Add" in refused(SRUN)
    scontrol("exit 3")
    assert "names no machine: exit code 3. Add" in refused(SRUN)
    scontrol("")
    assert "names no machine: exit code 0. Add" in refused(SRUN)


def test_a_host_that_cannot_be_found(
    refused: Callable[..., str], scontrol: Callable[[str], Path]
) -> None:
    scontrol("echo elsewhere")
    assert refused(SRUN) == (
        "The machine of rank 0, MASTER_ADDR elsewhere, is not known on node9 (Name or service not "
        "known). Export MASTER_ADDR with an address that every machine can reach."
    )


# MPI.


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpirun(
    launched: Launched, mpi: Callable[..., FakeMPI], environment: dict[str, str]
) -> None:
    fake = mpi(8, ("node1", 4321))
    assert launched(environment) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "4321",
    }
    init, (host, port), finalize = fake.calls
    # MPI is neither opened by the import nor left open.
    assert (init, finalize) == (("Init", False, False), "Finalize")
    assert host == "node9" and 1024 <= port < 65536


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpirun_on_one_machine_needs_no_host_name(
    launched: Launched, mpi: Callable[..., FakeMPI], environment: dict[str, str]
) -> None:
    local = {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "MPI_LOCALNRANKS": "8"}
    fake = mpi(8)
    assert launched(environment, local)["MASTER_ADDR"] == "127.0.0.1"
    assert fake.calls[1][0] == "127.0.0.1"  # type: ignore[index]


def test_an_exported_half_of_the_address_is_used(
    launched: Launched, mpi: Callable[..., FakeMPI]
) -> None:
    mpi(8, ("node1", 4321))
    found = launched(OPEN_MPI, {"MASTER_ADDR": "node2"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node2", "4321")
    found = launched(OPEN_MPI, {"MASTER_PORT": "77"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node1", "77")


def test_mpirun_inside_an_allocation(launched: Launched) -> None:
    """It starts its daemons with srun, one a machine; ranks inherit that step's variables."""
    step = {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    for launcher in (OPEN_MPI, MPICH):
        found = launched(step, {"SLURM_NTASKS": "2"}, launcher, MASTER)
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "8", "1")


def test_mpirun_needs_no_mpi4py_where_nothing_is_to_agree_on(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert launched(OPEN_MPI, MASTER)["MASTER_PORT"] == "1234"
    one = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    local = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    found = launched(one, local)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_no_mpi4py(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    message = refused(OPEN_MPI)
    assert message.startswith(
        "Open MPI's mpirun started 8 processes, which need mpi4py to agree where to meet"
    )
    assert message.endswith(
        "Install it (pip install mpi4py), or export MASTER_ADDR and MASTER_PORT "
        "(with Open MPI: mpirun -x MASTER_ADDR=node1 ...)."
    )


def test_mpi4py_of_another_mpi(refused: Callable[..., str], mpi: Callable[..., FakeMPI]) -> None:
    """Each process then believes that it is alone."""
    mpi(1)
    assert refused(MPICH) == (
        "mpirun of MPICH or Intel MPI started 8 processes (PMI_SIZE) but mpi4py sees 1: it uses "
        "another MPI. Build it for this one (pip install --no-binary mpi4py mpi4py), or export "
        "MASTER_ADDR and MASTER_PORT (with Open MPI: mpirun -x MASTER_ADDR=node1 ...)."
    )


@pytest.mark.parametrize(
    ("environment", "missing", "remedy"),
    [
        (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "RANK"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"),
        (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK"),
        (MPICH, "PMI_RANK", "RANK"),
        (MPICH, "PMI_SIZE", "WORLD_SIZE"),
        (MPICH, "MPI_LOCALRANKID", "LOCAL_RANK"),
    ],
)
def test_half_of_what_mpirun_sets_is_refused(
    launched: Launched,
    refused: Callable[..., str],
    environment: dict[str, str],
    missing: str,
    remedy: str,
) -> None:
    message = refused(environment, without=(missing,))
    assert f" but not {missing}. Export {remedy}, or start" in message
    # The remedy works.
    exported = {remedy: environment[missing]}
    found = launched(environment, exported, MASTER, without=(missing,))
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "8", "1")


# Contradictions and typing errors.


def test_an_exported_world_size_must_agree(launched: Launched, refused: Callable[..., str]) -> None:
    assert launched(SRUN, MASTER, {"WORLD_SIZE": "8"})["RANK"] == "5"
    assert refused(SRUN, {"WORLD_SIZE": "16"}) == (
        "WORLD_SIZE=16 contradicts SLURM_STEP_NUM_TASKS=8 of srun. Unset WORLD_SIZE, or export "
        "both RANK and WORLD_SIZE."
    )
    assert refused(OPEN_MPI, {"RANK": "0"}) == (
        "RANK=0 contradicts OMPI_COMM_WORLD_RANK=5 of Open MPI's mpirun. Unset RANK, or export "
        "both RANK and WORLD_SIZE."
    )


def test_a_rank_outside_the_world_is_refused(refused: Callable[..., str]) -> None:
    assert refused({"RANK": "2", "WORLD_SIZE": "2"}) == (
        "RANK=2 contradicts WORLD_SIZE=2: ranks count from 0. Unset both, or set them for each "
        "process."
    )
    assert "RANK=5 contradicts WORLD_SIZE=4" in refused(OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": "4"})


GIVEN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "-1", "RANK='-1' in the environment is not a whole number; unset it."),
        ("RANK", "\u0663", "RANK='\u0663' in the environment is not a whole number; unset it."),
        ("WORLD_SIZE", "two", "WORLD_SIZE='two' in the environment is not a whole number"),
        ("WORLD_SIZE", "", "WORLD_SIZE='' in the environment is not a whole number; unset it."),
        ("WORLD_SIZE", "1.0", "WORLD_SIZE='1.0' in the environment is not a whole number"),
        ("LOCAL_RANK", "x", "LOCAL_RANK='x' in the environment is not a whole number; unset it."),
        ("MASTER_PORT", "http", "MASTER_PORT='http' in the environment is not a whole number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0 in the environment: a job has at least one process."),
        ("WORLD_SIZE", "2000000", "WORLD_SIZE=2000000 in the environment is too large (at most 1"),
        ("WORLD_SIZE", "9" * 5000, f"WORLD_SIZE={'9' * 20} in the environment is too large ("),
        ("MASTER_PORT", "65536", "MASTER_PORT=65536 in the environment is too large (at most 6"),
        ("MASTER_PORT", "0", "MASTER_PORT=0 is not a port where ranks can meet; set 1 or more."),
        (
            "MASTER_ADDR",
            "elsewhere",
            "The machine of rank 0, MASTER_ADDR elsewhere, is not known on node9 (Name or service "
            "not known). Export MASTER_ADDR with an address that every machine can reach.",
        ),
        ("MASTER_ADDR", "a" * 70 + ".b", f"The machine of rank 0, MASTER_ADDR {'a' * 70}.b, is n"),
        ("MASTER_ADDR", "", "The environment sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT but "),
    ],
)
def test_each_variable_of_a_launch_is_checked(
    refused: Callable[..., str], name: str, value: str, message: str
) -> None:
    assert refused(GIVEN, {name: value}).startswith(message)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' in the environment is not a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment: a job has at least"),
        (
            {"WORLD_SIZE": "2"},
            "The environment sets WORLD_SIZE but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
        ),
        ({"RANK": "0"}, "The environment sets RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment is not a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment is too large"),
    ],
)
def test_each_variable_alone_is_checked(
    refused: Callable[..., str], environment: dict[str, str], message: str
) -> None:
    assert refused(environment).startswith(message)


def test_one_process_needs_no_address(launched: Launched) -> None:
    alone = {**GIVEN, "WORLD_SIZE": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "0"}
    assert launched(alone) == alone


def test_a_launcher_number_that_is_none(refused: Callable[..., str]) -> None:
    assert refused(SRUN, {"SLURM_PROCID": "x"}) == (
        "SLURM_PROCID='x' in the environment is not a whole number; unset it."
    )


def test_who_speaks_of_an_error_is_known_before_it(refused: Callable[..., str]) -> None:
    """main.fail() lets rank 0 speak first, by RANK."""
    refused(SRUN)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("5", "8")
