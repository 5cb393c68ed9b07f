"""The last MLP's backward pass over chosen tokens, against the plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_eslm.ops.activations import GELU
from megatron_eslm.ops.kept_tokens_mlp import LossTokenIndex, kept_tokens_mlp
from tests.harness import run_ranks

N, D, WIDE = 13, 6, 12


def tensors(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = ((N, D), (WIDE, D), (WIDE,), (D, WIDE))
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


def plain(x, up, bias, down):
    return F.gelu(x @ up.t() + bias, approximate="tanh") @ down.t()


def gradients(out, inputs, chosen, scale=1.0):
    rng = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=rng).to(out.dtype) * scale
    if chosen is not None:
        dropped = torch.ones(N, dtype=torch.bool)
        dropped[chosen] = False
        upstream[dropped] = 0
    return torch.autograd.grad(out, inputs, upstream)


CHOSEN = {
    "all": None,
    "some": torch.tensor([0, 3, 4, 9, 12]),
    "one": torch.tensor([5]),
    "none": torch.tensor([], dtype=torch.int64),
}


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN.keys())
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
def test_value_and_gradients_are_those_of_the_plain_form(chosen, dtype, tolerance):
    inputs = [x.requires_grad_() for x in tensors(dtype)]
    before = [x.detach().clone() for x in inputs]
    tokens = LossTokenIndex()
    out = kept_tokens_mlp(*inputs, GELU, tokens)
    tokens.chosen_S = chosen  # known only after the forward pass
    torch.testing.assert_close(out, plain(*inputs), rtol=0, atol=0)
    found = gradients(out, inputs, chosen, scale=3.0)
    expected = gradients(plain(*inputs), inputs, chosen, scale=3.0)
    for ours, theirs, x in zip(found, expected, inputs, strict=True):
        assert ours.shape == x.shape and ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(x, y)


def test_other_tokens_are_not_looked_at():
    inputs = [x.requires_grad_() for x in tensors()]
    chosen = CHOSEN["some"]
    out = kept_tokens_mlp(*inputs, GELU, LossTokenIndex(chosen))
    noisy = torch.autograd.grad(out, inputs, torch.ones_like(out))
    zeros = torch.zeros_like(out)
    zeros[chosen] = 1.0
    clean = torch.autograd.grad(
        kept_tokens_mlp(*inputs, GELU, LossTokenIndex(chosen)), inputs, zeros
    )
    for a, b in zip(noisy, clean, strict=True):
        assert torch.equal(a, b)


def _two_ranks(rank: int) -> None:
    import torch.distributed as dist

    x, up, bias, down = tensors()
    half = slice(rank * WIDE // 2, (rank + 1) * WIDE // 2)
    parts = [t.clone().requires_grad_() for t in (x, up[half], bias[half], down[:, half])]
    whole = [t.requires_grad_() for t in (x, up, bias, down)]
    chosen = CHOSEN["some"]
    out = kept_tokens_mlp(*parts, GELU, LossTokenIndex(chosen), dist.group.WORLD)
    torch.testing.assert_close(out, plain(*whole), rtol=1e-5, atol=1e-5)
    found = gradients(out, parts, chosen)
    full = gradients(plain(*whole), whole, chosen)
    expected = (full[0], full[1][half], full[2][half], full[3][:, half])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_columns_over_two_ranks():
    run_ranks(2, _two_ranks)
