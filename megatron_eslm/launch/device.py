"""Which device this rank trains on, and why it cannot be a GPU where the machine has one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from megatron_eslm.errors import ConfigError

DRIVER_FILE = Path("/proc/driver/nvidia/version")
CONTROL_FILE = Path("/dev/nvidiactl")
OLDEST_DRIVER = {12: 525, 13: 580}
"""Oldest driver branch for each major CUDA version (NVIDIA's table of minor-version compatibility,
https://docs.nvidia.com/deploy/cuda-compatibility)."""


def unusable_gpu() -> str | None:
    """Why torch cannot use the GPUs of this machine; None where it can, or where there are none.

    GPUs that were hidden on purpose (CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR=cpu) count as none.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if torch.cuda.is_available() or hidden or os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    driver = driver_version()
    if driver is None and not CONTROL_FILE.exists():
        return None
    version = torch.version.cuda
    name = f"driver {driver}" if driver else "an unreadable driver version"
    if version is None:
        return (
            f"it has an NVIDIA GPU ({name}) and torch {torch.__version__} is a build for the CPU. "
            "Install a CUDA build (README, Installation: make install TORCH_INDEX=...)"
        )
    oldest = OLDEST_DRIVER.get(int(version.partition(".")[0]))
    if driver and oldest and int(driver.partition(".")[0]) < oldest:
        return (
            f"it has an NVIDIA GPU and {name}, which is too old for the CUDA {version} that torch "
            f"{torch.__version__} was built for: that needs {oldest} or newer. Update the driver, "
            "or install torch for an older CUDA (README, Installation: make install "
            "TORCH_INDEX=...)"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "nvidia-smi"
    return (
        f"it has an NVIDIA GPU ({name}) that torch {torch.__version__} for CUDA {version} cannot "
        f"open. Check {shown} and the container's access to /dev/nvidia*"
    )


def driver_version() -> str | None:
    """Of the NVIDIA kernel module, as 550.54.15; None where there is none."""
    try:
        text = DRIVER_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
    return found[1] if found else None


def prepare_device() -> torch.device:
    """This process's device; on a machine without CUDA, makes megatron-core allocate on the CPU.

    Raises:
        ConfigError: there is no GPU for this local rank, or the machine has GPUs that torch cannot
            use.
    """
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"Local rank {local_rank} has no GPU of its own: this machine shows "
                f"{torch.cuda.device_count()}. Start at most that many processes per machine, or "
                "export LOCAL_RANK=0 where the launcher shows each process one GPU only."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    why = unusable_gpu()
    if why is not None:
        raise ConfigError(
            f"This machine would train on its CPU: {why}. To train on the CPU all the same, set "
            "DS_ACCELERATOR=cpu."
        )
    # Its result is only ever used as a `device=` argument.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    return torch.device("cpu")


def out_of_memory_text(error: BaseException) -> str | None:
    """What to do about an error if it is a lack of memory; None for others."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
        return None
    first = text.strip().partition("\n")[0]
    return (
        f"Out of memory: {first} Lower --micro-batch-size (with the same --global-batch-size), or "
        "give --head-logits recompute, --activation-checkpoint-interval 1, a higher --zero-stage, "
        "--cpu-offload, or more tensor-parallel ranks or stages. --dry-run estimates each."
    )


def device_text(device: torch.device) -> str:
    """What a rank trains on, for the first line of the log."""
    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads per process, gloo"
    name = torch.cuda.get_device_name(device)
    return f"{name}, CUDA {torch.version.cuda}, driver {driver_version() or 'unknown'}, NCCL"


def order_kernels_for_tensor_parallel(tp_size: int) -> None:
    """Let megatron-core overlap collectives with products under tensor parallelism.

    It relies on one hardware queue, so that a collective starts before the product that is launched
    after it. Without tensor parallelism one queue would only hold up other streams. Must come
    before anything asks for the device.
    """
    if tp_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def set_matmul_precision(*, tf32: bool, deterministic: bool) -> None:
    """`--tf32` and `--deterministic`; before the first product."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
