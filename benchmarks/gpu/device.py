"""Row 1: the device, what torch can use of it, and how fast its products and copies are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from benchmarks.gpu.row import Row, at_least, exactly
from benchmarks.gpu.setup import Setup
from megatron_eslm.launch.device import driver_version
from megatron_eslm.ops.head.dispatch import resolve_head_kernel

SHARE_OF_PEAK = 0.6
"""Of a large bf16 product: 600 TFLOP/s on an H100 SXM."""


def rows(setup: Setup) -> Iterator[Row]:
    """Of the device."""
    if setup.cuda:
        yield from _cuda_facts()
    size = 256 if setup.toy else 8192
    a, b = (torch.randn(size, size, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    tflops = 2 * size**3 / seconds_of(lambda: a @ b, setup) / 1e12
    what = f"bf16 product of {size} x {size}, TFLOP/s"
    peak = setup.peak_flops
    if setup.toy:
        yield Row.measured(1, what, tflops, at_least(1e-6))
    elif peak is None:
        yield Row.measured(1, what, tflops, None, "peak unknown: give --peak-tflops")
    else:
        yield Row.measured(1, what, tflops, at_least(SHARE_OF_PEAK * peak / 1e12))
    yield Row.measured(1, "copy on the device, GB/s", copy_bandwidth(setup) / 1e9)
    if setup.cuda:
        for pinned in (False, True):
            kind = "pinned" if pinned else "pageable"
            host = torch.empty(2**26, pin_memory=pinned)
            seconds = seconds_of(partial(host.to, setup.device, non_blocking=True), setup)
            yield Row.measured(1, f"copy from {kind} memory, GB/s", 4 * 2**26 / seconds / 1e9)


def _cuda_facts() -> Iterator[Row]:
    properties = torch.cuda.get_device_properties(0)
    yield Row.fact(
        1,
        "device",
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"{properties.multi_processor_count} multiprocessors, driver {driver_version()}, "
        f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, "
        f"torch {torch.__version__}",
    )
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Row.measured(1, "bf16", bf16, exactly(1))
    # T = 1024 and 64 channels a head, as the presets have.
    q = torch.empty(12, 12, 1024, 64, device="cuda", dtype=torch.bfloat16)
    params = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, True, False)
    flash = torch.backends.cuda.can_use_flash_attention(params, True)
    yield Row.measured(1, "flash attention", flash, exactly(1))
    yield Row.measured(
        1, "cuDNN attention", torch.backends.cuda.can_use_cudnn_attention(params, True)
    )
    kernel = resolve_head_kernel("auto", "cuda")
    note = "" if kernel == "triton" else "Triton or its C compiler is missing: doctor"
    yield Row.measured(1, "head by Triton", kernel == "triton", exactly(1), note)


def seconds_of(work: Callable[[], object], setup: Setup, repetitions: int = 10) -> float:
    """Median of some work on the device, after three warm-up calls."""
    for _ in range(3):
        work()
    found = []
    for _ in range(repetitions):
        setup.wait()
        begin = time.perf_counter()
        work()
        setup.wait()
        found.append(time.perf_counter() - begin)
    return median(found)


def copy_bandwidth(setup: Setup) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(2**20 if setup.toy else 2**29, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), setup)
