"""Show what is installed and used, what is missing, and the remedy.

    megatron-eslm doctor

The last line says whether this machine can train. If it cannot, the exit code is 1.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence

from megatron_eslm.command_line import Parser, command

REQUIRED = (
    "torch",
    "deepspeed",
    "megatron-core",
    "tiktoken",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "datasets",
    "safetensors",
    "zstandard",
    "pyarrow",
)
OPTIONAL = {
    "lm-eval": "only for tools/evaluate.py and --eval-tasks: pip install 'megatron-eslm[eval]'",
    "mpi4py": "only to launch with MPI: pip install mpi4py (needs an MPI library)",
    "wandb": "only for --wandb-project: pip install 'megatron-eslm[wandb]'",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[tuple[str, str]]:
    yield "megatron-eslm", _version("megatron-eslm") or "not installed; run from the checkout"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for name in REQUIRED:
        yield name, _version(name) or "MISSING: pip install --constraint constraints.txt -e ."
    for name, remedy in OPTIONAL.items():
        yield name, _version(name) or f"not installed ({remedy})"


def _accelerator(why_not_gpu: str | None) -> Iterator[tuple[str, str]]:
    import torch

    from megatron_eslm.launch.device import driver_version

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        driver = f"driver {driver_version() or 'unknown'}"
        yield "accelerator", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}, {driver}, NCCL"
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield "precisions", f"float32, {'bf16, ' if bf16 else ''}fp16"
        return
    from deepspeed.accelerator import get_accelerator

    if why_not_gpu is not None:
        yield "GPU", f"UNUSABLE: {why_not_gpu}"
        reason = "only with DS_ACCELERATOR=cpu"
    elif torch.version.cuda is None:
        reason = "torch was built without CUDA"
    else:
        reason = "no GPU is visible"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "accelerator", f"CPU ({reason}), {cores}, gloo"
    fp16 = ", fp16" if get_accelerator().is_fp16_supported() else " (no fp16 on this processor)"
    yield "precisions", f"float32, bf16{fp16}"


def _kernels() -> Iterator[tuple[str, str]]:
    import torch

    yield "attention", "torch scaled_dot_product_attention (flash kernels)"
    yield "layer norm", "torch (fused on CUDA)"
    yield "optimizer", "torch AdamW, fused"
    from megatron_eslm.ops.head.dispatch import resolve_head_kernel

    kernel = resolve_head_kernel("auto", "cuda" if torch.cuda.is_available() else "cpu")
    triton = _version("triton") or "not installed"
    yield "head", f"selective linear cross-entropy (ours), --head-kernel auto is {kernel}"
    from megatron_eslm.ops.head.dispatch import c_compiler

    builds = c_compiler() or "no C compiler"
    yield "triton", f"{triton}, {builds}; --head-kernel triton needs both, and CUDA"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    yield (
        "C++ compiler",
        compiler
        or "none; --cpu-offload (with ninja) and --compile need one: install g++, or set CXX",
    )
    if torch.cuda.is_available():
        yield "nvcc", shutil.which("nvcc") or "none; nothing here needs it"


@command
def main(argv: Sequence[str]) -> int:
    """Print the report; return 1 if this machine cannot train."""
    Parser(__doc__).parse_args(argv)
    facts = [*_packages()]
    missing = [name for name, value in facts if value.startswith("MISSING")]
    why_not_gpu = None
    if "torch" not in missing and "deepspeed" not in missing:
        from megatron_eslm.launch.bootstrap import quiet_imports
        from megatron_eslm.launch.device import unusable_gpu

        why_not_gpu = unusable_gpu()  # before the next line, which settles for the CPU
        quiet_imports()
        facts += [*_accelerator(why_not_gpu), *_kernels()]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")
    if missing:
        print(f"\nCannot train: {', '.join(missing)} missing.")
    elif why_not_gpu is not None:
        print("\nCannot train on the GPU of this machine (line GPU).")
    else:
        place = next(value for name, value in facts if name == "accelerator")
        print(f"\nCan train on: {place}.")
    return 1 if missing or why_not_gpu is not None else 0


if __name__ == "__main__":
    sys.exit(main())
