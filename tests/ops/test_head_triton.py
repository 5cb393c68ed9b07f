"""Triton's forms of the head: in its interpreter, compiled for GPUs, and where they are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_eslm.config.run import parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.head import dispatch, torch_kernel
from megatron_eslm.ops.head.contract import HeadKernel
from megatron_eslm.ops.head.dispatch import head_backend, resolve_head_kernel
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from megatron_eslm.training.build import build_model, build_trainer

ROOT = Path(__file__).parents[2]


def in_a_process(*command: str, **environment: str) -> str:
    """What a new Python says, which must succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    said = in_a_process(
        "-m", "pytest", "tests/ops/triton_checks.py", "-q", "-rs", TRITON_INTERPRET="1"
    )
    assert re.search(r"skipped|deselected", said) is None, said


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_eslm.ops.head import triton_kernel
from megatron_eslm.ops.head import triton_fused_kernel

INTS = "stride sums_stride out_stride hidden_stride weight_stride num_columns num_real num_tokens "
INTS += "num_hidden share_columns num_shares"
ALIGNED = "stride out_stride hidden_stride weight_stride num_columns num_hidden share_columns"

def shared_memory(kernel, element, capability, num_warps, num_stages=3, **constants):
    types = dict.fromkeys(INTS.split(), "i32")
    types |= dict.fromkeys(["column_ptr", "kept_ptr"], "*i64")
    types |= dict.fromkeys(["max_ptr", "sums_ptr", "lse_ptr", "grad_ptr"], "*fp32")
    types |= dict.fromkeys(["logits_ptr", "out_ptr", "hidden_ptr", "weight_ptr"], "*" + element)
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and (name.endswith("ptr") or name in ALIGNED.split())
        },
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"]
    return compiled.metadata.shared

capability, limit = int(sys.argv[1]), int(sys.argv[2])
for element, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
    chunk = {"COLUMNS": triton_kernel.COLUMNS, "num_warps": triton_kernel.NUM_WARPS}
    fused, tile = triton_fused_kernel, triton_fused_kernel.TILES[size]
    used = [
        shared_memory(triton_kernel._statistics_kernel, element, capability, ENTROPY=True, **chunk),
        shared_memory(triton_kernel._gradient_kernel, element, capability, INDEXED=True, **chunk),
        shared_memory(
            triton_kernel._gradient_kernel, element, capability,
            INDEXED=False, kept_ptr=None, **chunk
        ),
        shared_memory(
            fused._fused_kernel, element, capability, fused.NUM_WARPS, fused.NUM_STAGES,
            ENTROPY=True, TOKENS=tile.tokens, COLUMNS=tile.columns, HIDDEN=tile.hidden,
            PRECISION="ieee" if size == 4 else "tf32", WIDEN=False,
        ),
    ]
    assert max(used) <= limit, (element, used)
    print("compiled", len(used))
"""


@pytest.mark.parametrize(
    ("capability", "shared_bytes"), [(80, 166_912), (90, 232_448)], ids=["A100", "H100"]
)
def test_they_compile_for_a_gpu_and_fit_into_its_shared_memory(
    tmp_path: Path, capability: int, shared_bytes: int
) -> None:
    """No GPU is needed to compile for one."""
    pytest.importorskip("triton")
    file = tmp_path / "compile_kernels.py"
    file.write_text(COMPILE)
    said = in_a_process(
        str(file),
        str(capability),
        str(shared_bytes),
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
        PYTHONPATH=str(ROOT),
    )
    assert said.split("\n")[:3] == ["compiled 4"] * 3


@pytest.mark.parametrize("kernel", ["triton", "triton-fused"])
def test_triton_is_refused_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, kernel: HeadKernel
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "triton_imports", lambda: True)
    with pytest.raises(ConfigError, match=f"--head-kernel {kernel} needs a CUDA device.*cpu"):
        resolve_head_kernel(kernel, "cpu")
    assert resolve_head_kernel(kernel, "cuda") == kernel
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_head_kernel(kernel, "cpu") == kernel
    monkeypatch.setattr(dispatch, "triton_imports", lambda: False)
    for device in ("cpu", "cuda"):
        with pytest.raises(ConfigError, match=f"--head-kernel {kernel} needs Triton.*pip install"):
            resolve_head_kernel(kernel, device)


def test_auto_is_triton_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for imports, on_cuda in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(dispatch, "triton_imports", lambda imports=imports: imports)
        assert resolve_head_kernel("auto", "cuda") == on_cuda
        assert resolve_head_kernel("auto", "cpu") == "torch"
        assert resolve_head_kernel("torch", "cuda") == "torch"
    assert head_backend("auto", torch.device("cpu")) is torch_kernel


def test_training_is_refused_before_anything_is_read_or_written(
    process_group: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "triton_imports", lambda: True)
    monkeypatch.chdir(tmp_path)
    run = parse_run(["--head-kernel", "triton", "--save", "run"], 1)
    with pytest.raises(ConfigError, match="--head-kernel triton needs a CUDA device"):
        build_trainer(run)
    assert not list(tmp_path.iterdir())


def test_the_option_reaches_both_heads(process_group: None) -> None:
    run = parse_run(["--head-kernel", "torch", "--num-layers", "2", "--hidden-size", "24"], 1)
    state = SelectionState(alpha=run.selection.initial_alpha)
    policy = build_policy(run.selection, state, Peers(0, 1, None), seed=0)
    model = build_model(run, run.shape(45), build_mesh(), policy, Recorder(), range(2))
    assert model.head.shard.kernel == model.early_exit.shard.kernel == "torch"
