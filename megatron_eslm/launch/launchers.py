"""Find rank and rendezvous address under launchers other than `deepspeed` and `torchrun`.

Those two set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process. MPI and
Slurm use variables of their own. `discover` translates these once, before anything reads the five.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass

from megatron_eslm.errors import ConfigError

_FIVE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MOST_PROCESSES = 1_000_000
_LIMITS = {
    "RANK": _MOST_PROCESSES,
    "WORLD_SIZE": _MOST_PROCESSES,
    "LOCAL_RANK": _MOST_PROCESSES,
    "MASTER_PORT": 65_535,
}
_MOST_NUMBER = 2**32
"""Upper bound for other numbers; Slurm's special steps have IDs just below it."""


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """The variables in which a launcher numbers its processes."""

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
# SLURM_NTASKS would be wrong: batch scripts and shells inside an allocation also have it (with
# SLURM_PROCID=0), and it counts tasks that could be started. Only srun sets the step's own count.
_SLURM = _Launcher(
    title="srun",
    rank="SLURM_PROCID",
    world_size="SLURM_STEP_NUM_TASKS",
    local_rank="SLURM_LOCALID",
    local_size="SLURM_STEP_NUM_NODES",
)


def discover() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the launcher's variables.

    Exported values take precedence: if RANK and WORLD_SIZE are set, no launcher is looked for, and
    LOCAL_RANK, MASTER_ADDR and MASTER_PORT are used as they are. Plain `python` sets nothing, even
    inside an allocation. Collective over the processes of mpirun if they must agree on an address.

    Raises:
        ConfigError: variables are missing, not numbers, or contradict each other; the address does
            not resolve; mpi4py is needed but missing or built for another MPI.
    """
    _check_numbers()
    launcher = None
    if not ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        launcher = _find_launcher()
    if launcher is None:
        described()
        return
    rank = _agreed("RANK", launcher.rank, launcher)
    world_size = _agreed("WORLD_SIZE", launcher.world_size, launcher)
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(_agreed("LOCAL_RANK", launcher.local_rank, launcher))
    # Set before anything else can fail: the rank decides which process reports an error.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    _check_numbers()
    if not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        _set_master(launcher, world_size)
    described()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Values of the five variables."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def described() -> Launch | None:
    """Read the five variables; None for a process that was started alone.

    Raises:
        ConfigError: only some of the five are set; one is not a number or out of range; the address
            does not resolve.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    _check_numbers()
    if missing := [name for name in _FIVE if not os.environ.get(name)]:
        present = [name for name in _FIVE if name not in missing]
        raise ConfigError(
            f"The environment sets {', '.join(present)} but not {', '.join(missing)}. Start with "
            "`deepspeed`, `torchrun` or plain `python`, or set all five."
        )
    launch = Launch(
        rank=_number("RANK"),
        world_size=_number("WORLD_SIZE"),
        local_rank=_number("LOCAL_RANK"),
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT"),
    )
    if launch.world_size > 1:
        if launch.port == 0:
            raise ConfigError("MASTER_PORT=0 is not a port where ranks can meet; set 1 or more.")
        _check_address(launch.address)
    return launch


def _find_launcher() -> _Launcher | None:
    """Identify the launcher of this process; None if it was started alone."""
    env = os.environ
    # MPI first: inside an allocation, mpirun reaches the machines through srun, so Slurm's
    # variables are set too but number the machines.
    if _OPEN_MPI.rank in env or _OPEN_MPI.world_size in env:
        return _OPEN_MPI
    if _HYDRA.local_rank in env:
        return _HYDRA
    # `srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE besides its own variables.
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
        # srun sets both to the same value; a job submitted from inside a step inherits only one.
        raise ConfigError(
            f"{_SLURM.world_size}={step} contradicts SLURM_NTASKS={total}: the variables were "
            "inherited from another Slurm step. Start this process with srun, or unset "
            "SLURM_STEP_ID."
        )
    return step > 1


def _number(name: str) -> int:
    text, most = os.environ[name], _LIMITS.get(name, _MOST_NUMBER)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number; unset it.")
    # Python refuses to parse numbers with thousands of digits.
    if len(text.lstrip("0")) > 10 or int(text) > most:
        raise ConfigError(f"{name}={text:.20} in the environment is too large (at most {most}).")
    return int(text)


def _check_numbers() -> None:
    """Check the range of each of the five variables that is set."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name in os.environ:
            _number(name)
    if os.environ.get("MASTER_PORT"):
        _number("MASTER_PORT")
    if "WORLD_SIZE" in os.environ and _number("WORLD_SIZE") == 0:
        raise ConfigError("WORLD_SIZE=0 in the environment: a job has at least one process.")
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is not None and world_size is not None and int(rank) >= int(world_size):
        raise ConfigError(
            f"RANK={rank} contradicts WORLD_SIZE={world_size}: ranks count from 0. Unset both, or "
            "set them for each process."
        )


def _agreed(name: str, theirs: str, launcher: _Launcher) -> int:
    """Value of `name` as exported or from the launcher's `theirs`; the two must agree."""
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


def _set_master(launcher: _Launcher, world_size: int) -> None:
    """Set MASTER_ADDR and MASTER_PORT, where missing, to the address and port of rank 0."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    machine_alone = "1" if launcher is _SLURM else str(world_size)
    own = socket.gethostname()
    here = "127.0.0.1" if os.environ.get(launcher.local_size) == machine_alone else None
    if launcher is _SLURM:
        address = address or here or _slurm_first_host()
        port = port or str(_slurm_port())
    else:
        # Rank 0 chooses: a port that is free there need not be free elsewhere.
        agreed = _agree_over_mpi(launcher, world_size, (here or own, _free_port()))
        address, port = address or agreed[0], port or str(agreed[1])
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)


def _check_address(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:  # UnicodeError: not encodable as a host name
        why = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ConfigError(
            f"The machine of rank 0, MASTER_ADDR {address}, is not known on "
            f"{socket.gethostname()} ({why}). Export MASTER_ADDR with an address that every "
            "machine can reach."
        ) from error


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _slurm_first_host() -> str:
    """Host of rank 0, unless tasks are placed with `--distribution=arbitrary`."""
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
            f"scontrol is needed to expand {name}={nodes} but is not installed here. Add to the "
            f"batch script: {remedy}"
        )
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
    )
    hosts = done.stdout.split()
    if done.returncode or not hosts:
        raise ConfigError(
            f"`scontrol show hostnames {nodes}` names no machine: "
            f"{done.stderr.strip() or f'exit code {done.returncode}'}. Add to the batch "
            f"script: {remedy}"
        )
    return hosts[0]


def _slurm_port() -> int:
    """A port equal for all processes of a step and different for later steps and jobs."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(
            "srun's environment does not set SLURM_JOB_ID, from which the port is derived. Export "
            "MASTER_PORT."
        )
    # Below the ephemeral ports.
    return 10_000 + (16 * _number("SLURM_JOB_ID") + _number("SLURM_STEP_ID")) % 20_000


def _agree_over_mpi(launcher: _Launcher, world_size: int, mine: tuple[str, int]) -> tuple[str, int]:
    """Broadcast rank 0's (address, port); returns `mine` if this is the only rank."""
    if world_size == 1:
        return mine
    exports = "export MASTER_ADDR and MASTER_PORT (with Open MPI: mpirun -x MASTER_ADDR=node1 ...)"
    try:
        import mpi4py

        # MPI is used for this one broadcast only. Left initialized, it would object to forked
        # loader processes and to any exit that skips its finalizer.
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library found
        raise ConfigError(
            f"{launcher.title} started {world_size} processes, which need mpi4py to agree where "
            f"to meet ({error}). Install it (pip install mpi4py), or "
            f"{exports}."
        ) from error
    MPI.Init()
    seen = MPI.COMM_WORLD.Get_size()
    result = MPI.COMM_WORLD.bcast(mine, root=0)
    MPI.Finalize()
    if seen != world_size:
        raise ConfigError(
            f"{launcher.title} started {world_size} processes ({launcher.world_size}) but mpi4py "
            f"sees {seen}: it uses another MPI. Build it for this one (pip install --no-binary "
            f"mpi4py mpi4py), or {exports}."
        )
    return result
