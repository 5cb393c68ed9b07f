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
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

import torch

from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def quiet_imports() -> None:
    """Import deepspeed and megatron-core without their notices about optional packages."""
    if not torch.cuda.is_available():
        # Said, it is taken without a warning that no GPU was found.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What megatron-core asks for, so that its overlapped collectives start in order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
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


def prepare_device() -> torch.device:
    """This process's device; on a machine without CUDA, makes megatron-core allocate on the CPU."""
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"Local rank {local_rank} has no GPU of its own: this machine shows "
                f"{torch.cuda.device_count()}. Start at most that many processes a machine, or "
                "export LOCAL_RANK=0 where the launcher shows each process one GPU only."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    # Its result is only ever used as a `device=` argument.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    return torch.device("cpu")


def init_distributed(timeout_seconds: float = 600.0) -> torch.device:
    """Join the process group that the launcher describes; without a launcher, form one of one.

    Works under `deepspeed`, `torchrun` and plain `python`. NCCL on CUDA, gloo on CPU.

    Raises:
        ConfigError: some but not all of the launcher's environment variables are set.
    """
    present = [name for name in _LAUNCH_VARIABLES if name in os.environ]
    alone = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    if alone:
        # Nobody else has to find this process: no port, which another one could take meanwhile.
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    elif missing := [name for name in _LAUNCH_VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"The environment sets {', '.join(present)} but not {', '.join(missing)}. Start with "
            "`deepspeed`, `torchrun` or plain `python`, or set all five."
        )
    device = prepare_device()
    quiet_imports()
    import deepspeed
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout_seconds),
            store=dist.HashStore() if alone else None,
            rank=0 if alone else -1,
            world_size=1 if alone else -1,
        )
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce, for inference only, on first use:
        # half a minute, and a C++ compiler, for nothing that training calls.
        backend = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    return device


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """A process group of one for tools that run the model outside a launcher."""
    import torch.distributed as dist

    quiet_imports()
    prepare_device()
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
