"""A rank at the rendezvous, and the identity of its job."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass

from megatron_eslm.launch.launchers import Launch
from megatron_eslm.watchdog.parent import Launcher
from megatron_eslm.watchdog.process import Process


@dataclass(frozen=True)
class Attendee:
    """The entry that a rank writes at the rendezvous."""

    rank: int
    world_size: int
    job: str
    """Identity of the job, if the launcher gives one or runs on this machine alone; else empty."""
    process: Process
    id: str

    @classmethod
    def of(cls, launch: Launch, launcher: Launcher | None) -> Attendee:
        process = Process.this()
        job = job_name(launch, launcher, process)
        return cls(launch.rank, launch.world_size, job, process, uuid.uuid4().hex)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Attendee:
        fields = json.loads(text)
        return cls(**{**fields, "process": Process(**fields["process"])})

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.process.host}, pid {self.process.pid})"


def job_name(launch: Launch, launcher: Launcher | None, process: Process) -> str:
    """Name the job: equal on all its ranks and, as far as can be known, different in other jobs."""
    env = os.environ
    parts = []
    if "TORCHELASTIC_RUN_ID" in env:
        parts.append(f"torchrun {env['TORCHELASTIC_RUN_ID']}")
    elif env.get("SLURM_PROCID") == env["RANK"] and "SLURM_STEP_NUM_TASKS" in env:
        if env["SLURM_STEP_NUM_TASKS"] == env["WORLD_SIZE"]:
            parts.append(f"Slurm {env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}")
    elif env.get("OMPI_COMM_WORLD_RANK") == env["RANK"] and "PMIX_NAMESPACE" in env:
        parts.append(f"MPI {env['PMIX_NAMESPACE']}")
    sizes = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    local_size = next((env[name] for name in sizes if name in env), None)
    if local_size == str(launch.world_size) and launcher is not None and launcher.common_pid:
        parts.append(f"launcher {launcher.common_pid} on {process.host}")
    return ", ".join(parts)
