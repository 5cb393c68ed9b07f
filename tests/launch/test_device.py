"""A GPU that torch cannot use is refused: no run trains on the CPU in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_eslm.commands.doctor import main as doctor
from megatron_eslm.errors import ConfigError
from megatron_eslm.launch import device
from megatron_eslm.launch.device import (
    device_text,
    driver_version,
    order_kernels_for_tensor_parallel,
    out_of_memory_text,
    prepare_device,
    set_matmul_precision,
    unusable_gpu,
)

DRIVER = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Nov  5 00:21:38 UTC 2024
GCC version:  gcc version 12.3.0
"""
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine with a GPU and a driver, as this process would see it."""

    def make(driver: str | None, cuda: str | None, text: str = DRIVER, **environ: str) -> None:
        path = tmp_path / "version"
        if driver is not None:
            path.write_text(text.format(driver))
        control = tmp_path / "nvidiactl"
        control.write_text("")
        monkeypatch.setattr(device, "DRIVER_FILE", path)
        monkeypatch.setattr(device, "CONTROL_FILE", control)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize("text", [DRIVER, OPEN], ids=["closed", "open"])
@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        ("550.54.15", "13.0", r"driver 550.54.15, which is too old .* CUDA 13.0 .* needs 580"),
        ("470.82.01", "12.6", r"driver 470.82.01, which is too old .* CUDA 12.6 .* needs 525"),
        ("580.65.06", "13.0", r"driver 580.65.06\) that torch .* cannot open. Check nvidia-smi"),
        ("550.54.15", None, r"torch .* is a build for the CPU. Install a CUDA build"),
        (None, "13.0", r"an unreadable driver version\) that torch .* cannot open"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused(
    machine, text: str, driver: str | None, cuda: str | None, said: str
) -> None:
    machine(driver, cuda, text)
    assert driver_version() == driver
    with pytest.raises(ConfigError, match=said) as caught:
        prepare_device()
    assert "DS_ACCELERATOR=cpu" in str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"DS_ACCELERATOR": "cpu"}],
    ids=str,
)
def test_a_gpu_that_is_hidden_on_purpose_is_none(machine, environ: dict[str, str]) -> None:
    machine("550.54.15", "13.0", **environ)
    assert unusable_gpu() is None
    assert prepare_device() == torch.device("cpu")
    assert device_text(torch.device("cpu")) == "CPU, 1 threads per process, gloo"


def test_a_wrong_list_of_devices_is_named(machine) -> None:
    machine("580.65.06", "13.0", CUDA_VISIBLE_DEVICES="7")
    assert "Check CUDA_VISIBLE_DEVICES=7" in str(unusable_gpu())


def test_doctor_says_why(machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine("550.54.15", "13.0")
    assert doctor([]) == 1
    shown = capsys.readouterr().out
    assert "GPU" in shown and "UNUSABLE: it has an NVIDIA GPU and driver 550.54.15" in shown
    assert shown.endswith("\nCannot train on the GPU of this machine (line GPU).\n")
    machine(None, None, CUDA_VISIBLE_DEVICES="")
    assert doctor([]) == 0
    assert "\nCan train on: CPU (torch was built without CUDA), " in capsys.readouterr().out


def test_one_queue_for_tensor_parallelism_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    import os

    order_kernels_for_tensor_parallel(1)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    order_kernels_for_tensor_parallel(2)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_precision_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")
    try:
        set_matmul_precision(tf32=True, deterministic=True)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        set_matmul_precision(tf32=False, deterministic=False)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_lack_of_memory_names_what_needs_less() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    for error in (caught.value, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore.")):
        text = out_of_memory_text(error)
        assert text is not None and text.startswith("Out of memory: ")
        for flag in ("--micro-batch-size", "--head-logits", "--zero-stage", "--cpu-offload"):
            assert flag in text
    assert out_of_memory_text(RuntimeError("another")) is None
