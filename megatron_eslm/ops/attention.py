"""`--attention-backend`: which of torch's attention kernels a process may use."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.attention import SDPBackend

from megatron_eslm.errors import ConfigError

AttentionBackend = Literal["auto", "flash", "cudnn", "efficient", "math"]

_KINDS: dict[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def choose_attention(
    backend: AttentionBackend,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    grouped: bool,
    mask: torch.Tensor | None = None,
) -> str:
    """Restrict this process to one kernel, or with auto to none, and say which one it will use.

    These are the switches that `torch.nn.attention.sdpa_kernel` sets for a block of code.

    Args:
        backend: `--attention-backend`.
        q, k: [1, heads, T, channels] of a layer, with its type and device; only asked about.
        grouped: whether several query heads share one of `k`.
        mask: mask of --reset-attention-mask; None: causal.

    Returns:
        Name of the kernel.

    Raises:
        ConfigError: the kernel takes no such tensors on this device.
    """
    _allow(_KINDS if backend == "auto" else (backend,))
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    try:
        found = torch._fused_sdp_choice(
            q, k, k, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    except RuntimeError:  # none of those that are allowed
        found = SDPBackend.ERROR.value
    name = next((name for name, kind in _KINDS.items() if kind.value == found), None)
    if name is not None and backend in ("auto", name):
        return name
    _allow(_KINDS)
    kind = str(q.dtype).removeprefix("torch.")
    raise ConfigError(
        f"--attention-backend {backend} does not take {kind} with {q.shape[-1]} channels per head"
        f"{', query groups' if grouped else ''}{', a mask' if mask is not None else ''} on "
        f"{q.device.type}. flash and cudnn need bf16 or "
        "fp16 on CUDA, efficient needs CUDA. Use --attention-backend auto, which takes the fastest "
        "that works."
    )


def _allow(names: dict[str, SDPBackend] | tuple[str, ...]) -> None:
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp("flash" in names)
    cuda.enable_cudnn_sdp("cudnn" in names)
    cuda.enable_mem_efficient_sdp("efficient" in names)
    cuda.enable_math_sdp("math" in names)
