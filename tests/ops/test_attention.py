"""--attention-backend on a CPU, which has two of the four kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.attention import AttentionBackend, choose_attention


@pytest.fixture(autouse=True)
def all_kernels_again() -> Iterator[None]:
    yield
    choose_attention("auto", *heads(), grouped=False)


def heads(groups: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 8, 16, generator=rng), torch.randn(1, groups, 8, 16, generator=rng)


def test_the_kernel_that_was_asked_for_is_used() -> None:
    q, k = heads()
    assert choose_attention("auto", q, k, grouped=False) == "flash"
    flash = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert choose_attention("math", q, k, grouped=False) == "math"
    assert not torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    math = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    torch.testing.assert_close(math, flash)
    assert choose_attention("flash", q, k, grouped=False) == "flash"
    # A rank that keeps no row has no heads to compute.
    assert F.scaled_dot_product_attention(q[:0], k[:0], k[:0], is_causal=True).shape[0] == 0


def test_query_groups_are_asked_about() -> None:
    for backend in ("auto", "math"):
        assert choose_attention(backend, *heads(2), grouped=True) in ("flash", "math")


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_kernel_that_the_device_lacks_is_refused(backend: AttentionBackend) -> None:
    with pytest.raises(ConfigError, match=f"--attention-backend {backend} .*float32.*on cpu.*auto"):
        choose_attention(backend, *heads(), grouped=False)
    assert torch.backends.cuda.flash_sdp_enabled()  # as before
