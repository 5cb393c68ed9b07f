"""What happens once: quiet imports, the device and the process group first, the end of a rank last.

megatron-core prints several warnings about optional packages when it is imported and calls
`torch.cuda.current_device()` where it needs a device to allocate on; both are dealt with here and
nowhere else.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import importlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.device import prepare_device
from megatron_eslm.launch.rendezvous import RENDEZVOUS_SECONDS, meet
from megatron_eslm.parallel.meeting import Meeting

logger = logging.getLogger(__name__)


def quiet_imports() -> None:
    """Import deepspeed and megatron-core without their notices about optional packages."""
    if not torch.cuda.is_available():
        # Said, it is taken without a warning that no GPU was found.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its sequence parallelism calls collectives by names that torch is renaming.
    warnings.filterwarnings(
        "ignore", r".*is deprecated. Please use `torch\.distributed", FutureWarning
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: F401
        import megatron.core.tensor_parallel  # noqa: F401
    for name in ("DeepSpeed", "megatron", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)


def init_distributed(
    timeout_seconds: float = 600.0,
    *,
    meeting: Meeting | None = None,
    connect_seconds: float = RENDEZVOUS_SECONDS,
) -> torch.device:
    """Form the process group of the ranks that have met; NCCL on CUDA, gloo on CPU.

    Args:
        timeout_seconds: how long collectives wait for a rank.
        meeting: of these ranks; by default they meet now, as the launcher describes it.
        connect_seconds: how long each rank may take to connect to all others.

    Raises:
        ConfigError: ranks that do not meet (see `meet`) or cannot connect.
    """
    import torch.distributed as dist

    if not dist.is_initialized() and meeting is None:
        meeting = meet(connect_seconds)
    device = prepare_device()
    quiet_imports()
    import deepspeed

    if not dist.is_initialized():
        assert meeting is not None
        _connect(meeting, device, timeout_seconds, connect_seconds)
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce, for inference only, on first use:
        # half a minute, and a C++ compiler, for nothing that training calls.
        backend = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    return device


def _connect(
    meeting: Meeting, device: torch.device, timeout_seconds: float, connect_seconds: float
) -> None:
    import torch.distributed as dist

    collectives = datetime.timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        # NCCL connects ranks at their first collective.
        meeting.store.set_timeout(collectives)
        backend, limit = "nccl", collectives
    else:
        # gloo connects every rank with every other one, and waits for each anew.
        limit = datetime.timedelta(seconds=connect_seconds)
        meeting.store.set_timeout(limit)
        backend = "gloo"
    try:
        dist.init_process_group(
            backend,
            timeout=limit,
            store=meeting.store,
            rank=meeting.rank,
            world_size=meeting.world_size,
            # NCCL then connects now, so that a bad network fails here.
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        text = str(error).strip().partition("\n")[0]
        known = ("unable to find address", "unable to resolve", "timeout", "timed out")
        if not any(words in text.lower() for words in known):
            raise
        raise ConfigError(
            f"rank {meeting.rank} (host {socket.gethostname()}) cannot connect to all other ranks "
            f"({text}). A firewall keeps machines apart, or the network interface is one that "
            "others cannot reach: set GLOO_SOCKET_IFNAME."
        ) from error
    meeting.store.set_timeout(collectives)
    if backend == "gloo":
        dist.distributed_c10d._set_pg_timeout(collectives)


def set_timeout_of_all_groups(seconds: float) -> None:
    """Have the collectives of every process group wait as long as those of the world.

    Groups that are made without a timeout get their backend's, 10 minutes with NCCL, which then
    aborts the process before the watchdog can name the rank at fault. DeepSpeed makes such groups
    for its pipelines.
    """
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=seconds)
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """A process group of one for tools that run the model outside a launcher."""
    import torch.distributed as dist

    prepare_device()
    quiet_imports()
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave(code: int = 0) -> NoReturn:
    """End this rank, whose part is done: destroy its group, exit without the interpreter's own end.

    A thread of gloo's may still hold tensors of the last collective. To let go of them it needs
    the interpreter, and aborts the process (exit code -6) if that is on its way out.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
