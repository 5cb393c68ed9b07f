"""The share of a process that mpirun or srun started: its rank, and the number of ranks."""

from __future__ import annotations

from megatron_eslm.errors import ConfigError


def mpi_share() -> tuple[int, int]:
    """This process's rank, and the number of ranks.

    MPI ends here again: the shares are made without it, and their workers are forked, which not
    every MPI allows.

    Raises:
        ConfigError: mpi4py, or the MPI library that it loads, is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the second: no MPI library
        raise ConfigError(
            f"--mpi needs mpi4py and an MPI library ({error}). Install them, or give --index and "
            "--of, as in --index $SLURM_PROCID --of $SLURM_NTASKS."
        ) from error
    world = MPI.COMM_WORLD
    rank, size = int(world.Get_rank()), int(world.Get_size())
    MPI.Finalize()
    return rank, size
