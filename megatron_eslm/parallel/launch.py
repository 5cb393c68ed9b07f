"""Which rank this process is, where neither `deepspeed` nor `torchrun` has said so.

Both set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process. MPI and Slurm
number their processes by names of their own; `discover` translates those, once, before anything
reads the five.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass

from megatron_eslm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """The variables by which a launcher numbers its processes."""

    title: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str
    """Processes on this machine (for Slurm: machines of the step)."""


_OPEN_MPI = _Launcher(
    title="Open MPI's mpirun",
    rank="OMPI_COMM_WORLD_RANK",
    world_size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = _Launcher(
    title="mpirun of MPICH or Intel MPI",
    rank="PMI_RANK",
    world_size="PMI_SIZE",
    local_rank="MPI_LOCALRANKID",
    local_size="MPI_LOCALNRANKS",
)
# SLURM_NTASKS is of no use: in a batch script, and in a shell inside an allocation, it counts tasks
# that could be started, beside SLURM_PROCID=0. Only srun sets the step's own count.
_SLURM = _Launcher(
    title="srun",
    rank="SLURM_PROCID",
    world_size="SLURM_STEP_NUM_TASKS",
    local_rank="SLURM_LOCALID",
    local_size="SLURM_STEP_NUM_NODES",
)


def discover() -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from what started us.

    What is exported already wins: with RANK and WORLD_SIZE no launcher is looked for, and
    LOCAL_RANK, MASTER_ADDR and MASTER_PORT are used as they are. A plain `python`, inside an
    allocation too, gets nothing. Collective over the processes that mpirun started, if they have
    to agree on an address.

    Raises:
        ConfigError: variables that are missing, are no numbers or contradict each other; an
            address that cannot be found; mpi4py that is needed and missing, or of another MPI.
    """
    if os.environ.get("MASTER_PORT"):
        _number("MASTER_PORT")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _check_range("RANK", "WORLD_SIZE")
        return
    launcher = _find_launcher()
    if launcher is None:
        return
    rank = _agreed("RANK", launcher.rank, launcher)
    world_size = _agreed("WORLD_SIZE", launcher.world_size, launcher)
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(_agreed("LOCAL_RANK", launcher.local_rank, launcher))
    # Set before anything else can fail: who speaks of an error depends on the rank.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    _check_range("RANK", "WORLD_SIZE")
    if not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        _set_master(launcher, world_size)


def _find_launcher() -> _Launcher | None:
    """Who started this process, if it was one of several."""
    env = os.environ
    # MPI first: inside an allocation its mpirun reaches the machines by srun, whose variables are
    # then found as well and number the machines.
    if _OPEN_MPI.rank in env or _OPEN_MPI.world_size in env:
        return _OPEN_MPI
    if _HYDRA.local_rank in env:
        return _HYDRA
    # `srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE, and its own.
    if "SLURM_STEP_ID" in env:
        return _SLURM if _several_tasks() else None
    if _HYDRA.rank in env or _HYDRA.world_size in env:
        return _HYDRA
    return None


def _several_tasks() -> bool:
    if _SLURM.world_size not in os.environ:
        raise ConfigError(
            f"The environment sets SLURM_STEP_ID but not {_SLURM.world_size}, which srun sets. "
            "Unset SLURM_STEP_ID, or export RANK and WORLD_SIZE."
        )
    step, total = _number(_SLURM.world_size), os.environ.get("SLURM_NTASKS")
    if step > 1 and total is not None and total != str(step):
        # srun sets both alike; a job that was submitted from inside a step inherits one.
        raise ConfigError(
            f"{_SLURM.world_size}={step} contradicts SLURM_NTASKS={total}: the step that this "
            "process remembers is not the one it runs in. Start it with srun, or unset "
            "SLURM_STEP_ID."
        )
    return step > 1


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number; unset it.")
    return int(text)


def _agreed(name: str, theirs: str, launcher: _Launcher) -> int:
    """`name` as exported, or as the launcher has it in `theirs`; both must say the same."""
    given = _number(name) if name in os.environ else None
    found = _number(theirs) if theirs in os.environ else None
    if given is not None and found is not None and given != found:
        raise ConfigError(
            f"{name}={given} contradicts {theirs}={found} of {launcher.title}. Unset {name}, or "
            "export both RANK and WORLD_SIZE."
        )
    value = found if given is None else given
    if value is None:
        known = (launcher.rank, launcher.world_size, launcher.local_rank)
        present = ", ".join(n for n in known if n in os.environ)
        raise ConfigError(
            f"The environment of {launcher.title} sets {present} but not {theirs}. Export {name}, "
            "or start with `deepspeed` or `torchrun`."
        )
    return value


def _check_range(rank: str, world_size: str) -> None:
    if _number(rank) >= _number(world_size):
        raise ConfigError(
            f"{rank}={os.environ[rank]} contradicts {world_size}={os.environ[world_size]}: ranks "
            "count from 0. Unset both, or set them for each process."
        )


def _set_master(launcher: _Launcher, world_size: int) -> None:
    """Set what is missing of MASTER_ADDR and MASTER_PORT: where all processes meet rank 0."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    machine_alone = "1" if launcher is _SLURM else str(world_size)
    own = socket.gethostname()
    here = "127.0.0.1" if os.environ.get(launcher.local_size) == machine_alone else None
    if launcher is _SLURM:
        address = address or here or _slurm_first_host()
        port = port or str(_slurm_port())
    else:
        # Rank 0's word counts: a port that is free there need not be free elsewhere.
        agreed = _agree_over_mpi(launcher, world_size, (here or own, _free_port()))
        address, port = address or agreed[0], port or str(agreed[1])
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError(
            f"The machine of rank 0, MASTER_ADDR {address}, is not known on {own} "
            f"({error.strerror}). Export MASTER_ADDR with an address that every machine can reach."
        ) from error
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _slurm_first_host() -> str:
    """The machine of rank 0, unless tasks are placed by `--distribution=arbitrary`."""
    name = next((n for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if n in os.environ), None)
    remedy = 'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
    if name is None:
        raise ConfigError(
            "srun's environment sets neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST, so the "
            "machine of rank 0 is not known. Export MASTER_ADDR."
        )
    nodes = os.environ[name]
    if shutil.which("scontrol") is None:
        raise ConfigError(
            f"scontrol is not installed here and has to expand {name}={nodes}. Write into the "
            f"batch script: {remedy}"
        )
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
    )
    hosts = done.stdout.split()
    if done.returncode or not hosts:
        raise ConfigError(
            f"`scontrol show hostnames {nodes}` names no machine: "
            f"{done.stderr.strip() or f'exit code {done.returncode}'}. Write into the batch "
            f"script: {remedy}"
        )
    return hosts[0]


def _slurm_port() -> int:
    """The same for every process of a step, another for the next steps and jobs."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(
            "srun's environment does not set SLURM_JOB_ID, from which the port follows. Export "
            "MASTER_PORT."
        )
    # Below the ports that systems hand out by themselves.
    return 10_000 + (16 * _number("SLURM_JOB_ID") + _number("SLURM_STEP_ID")) % 20_000


def _agree_over_mpi(launcher: _Launcher, world_size: int, mine: tuple[str, int]) -> tuple[str, int]:
    """Rank 0's (address, port) on every rank; `mine` where this is the only rank."""
    if world_size == 1:
        return mine
    exports = "export MASTER_ADDR and MASTER_PORT (with Open MPI: mpirun -x MASTER_ADDR=node1 ...)"
    try:
        import mpi4py

        # MPI is only asked this one question. Left open, it would object to forked loader
        # processes and to every exit that does not pass through its finalizer.
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        raise ConfigError(
            f"{launcher.title} started {world_size} processes, and without mpi4py they cannot "
            f"agree where to meet ({error}). Install it (pip install mpi4py), or "
            f"{exports}."
        ) from error
    MPI.Init()
    seen = MPI.COMM_WORLD.Get_size()
    result = MPI.COMM_WORLD.bcast(mine, root=0)
    MPI.Finalize()
    if seen != world_size:
        raise ConfigError(
            f"{launcher.title} started {world_size} processes ({launcher.world_size}) and mpi4py "
            f"sees {seen}: it uses another MPI. Build it for this one (pip install --no-binary "
            f"mpi4py mpi4py), or {exports}."
        )
    return result
