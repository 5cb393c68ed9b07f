"""Ghost products against gradients that are written out in full, in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_eslm.ops.ghost_products import (
    GradientProducts,
    head_gradients,
    linear_products,
    tied_embedding_products,
    vector_products,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Rows, candidates, positions, inputs, outputs.
SHAPES = [(2, 1, 1, 1, 1), (5, 3, 7, 4, 9), (9, 6, 13, 17, 5), (4, 4, 3, 8, 8)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(dtype)


def explicit(grads_RP: torch.Tensor, num_candidates: int) -> GradientProducts:
    """Products of gradients [R, P] that exist."""
    g_MP = grads_RP[:num_candidates]
    return GradientProducts(g_MP @ g_MP.t(), g_MP @ grads_RP[num_candidates:].sum(dim=0))


def assert_close(ours: GradientProducts, plain: GradientProducts, tolerance: float) -> None:
    assert ours.pairs_MM.dtype == ours.validation_M.dtype == torch.float32
    # Relative to the norms of the gradients: a product of orthogonal ones is rounding alone.
    scale = plain.pairs_MM.diagonal().max().item()
    torch.testing.assert_close(
        ours.pairs_MM.double(), plain.pairs_MM, rtol=0.0, atol=tolerance * scale
    )
    if plain.validation_M.any():
        scale = plain.validation_M.abs().max().item()
        torch.testing.assert_close(
            ours.validation_M.double(), plain.validation_M, rtol=0.0, atol=tolerance * scale
        )
    else:
        assert not ours.validation_M.any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    rows, candidates, positions, d, f = shape
    inputs_RTD = draw(rows, positions, d, seed=1, dtype=dtype)
    grads_RTF = draw(rows, positions, f, seed=2, dtype=dtype)
    before = inputs_RTD.clone(), grads_RTF.clone()

    weight_RFD = torch.einsum("rtf,rtd->rfd", grads_RTF.double(), inputs_RTD.double())
    parts = [weight_RFD.flatten(1)] + [grads_RTF.double().sum(dim=1)] * bias
    plain = explicit(torch.cat(parts, dim=1), candidates)
    one_pair = 4 * positions**2
    for chunk_bytes in (1, 2 * one_pair, 2**27):
        ours = linear_products(
            inputs_RTD, grads_RTF, candidates, bias=bias, chunk_bytes=chunk_bytes
        )
        assert_close(ours, plain, TOLERANCE[dtype])
    assert torch.equal(inputs_RTD, before[0]) and torch.equal(grads_RTF, before[1])


def test_many_float16_numbers_stay_in_its_range() -> None:
    x_RTD = torch.full((3, 4, 256), 30.0, dtype=torch.float16)  # 256 x 30^2 is beyond 65,504
    ours = linear_products(x_RTD, x_RTD, 2, bias=True)
    plain = explicit(torch.einsum("rtf,rtd->rfd", x_RTD.double(), x_RTD.double()).flatten(1), 2)
    assert ours.pairs_MM.isfinite().all() and ours.validation_M.isfinite().all()
    torch.testing.assert_close(ours.validation_M.double(), plain.validation_M, rtol=1e-3, atol=0)


def test_vectors() -> None:
    grads_RD = draw(5, 11, seed=3)
    assert_close(vector_products(grads_RD, 3), explicit(grads_RD.double(), 3), 1e-6)


def test_products_add_up() -> None:
    total = GradientProducts.zeros(3, torch.device("cpu"))
    a, b = (vector_products(draw(5, 4, seed=seed), 3) for seed in (4, 5))
    total += a
    total += b
    assert torch.equal(total.pairs_MM, a.pairs_MM + b.pairs_MM)
    assert torch.equal(total.validation_M, a.validation_M + b.validation_M)


class Tied:
    """A word embedding used as lookup and as head, and everything about it in float64."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.rows, self.candidates, self.positions, d, _ = shape
        self.vocab_size, padded = 11, 16
        rng = torch.Generator().manual_seed(6)
        self.weight_VD = draw(padded, d, seed=7, dtype=dtype)
        self.normed_RTD = draw(self.rows, self.positions, d, seed=8, dtype=dtype)
        self.lookup_RTD = draw(self.rows, self.positions, d, seed=9, dtype=dtype)
        size = (self.rows, self.positions)
        # Few ids, so that sequences share them.
        self.tokens_RT = torch.randint(4, size, generator=rng)
        self.labels_RT = torch.randint(self.vocab_size, size, generator=rng)
        self.valid_RT = torch.rand(size, generator=rng) < 0.8

    def head_loss(self, row: int, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = normed @ weight[: self.vocab_size].t()
        loss_T = torch.nn.functional.cross_entropy(logits, self.labels_RT[row], reduction="none")
        return (loss_T * self.valid_RT[row]).sum()

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(of the head's input [R, T, D], of the weight by both uses [R, V, D])."""
        hidden, weights = [], []
        for row in range(self.rows):
            normed = self.normed_RTD[row].double().requires_grad_()
            weight = self.weight_VD.double().requires_grad_()
            # A lookup whose output has the gradient that is given.
            looked_up = weight[self.tokens_RT[row]] * self.lookup_RTD[row].double()
            total = self.head_loss(row, normed, weight) + looked_up.sum()
            for found, gradient in zip(
                (hidden, weights), torch.autograd.grad(total, (normed, weight)), strict=True
            ):
                found.append(gradient)
        return torch.stack(hidden), torch.stack(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tied_embedding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Tied(shape, dtype)
    hidden_RTD, weight_RVD = case.gradients()
    plain = explicit(weight_RVD.flatten(1), case.candidates)
    before = [t.clone() for t in (case.weight_VD, case.normed_RTD, case.lookup_RTD)]
    for chunk_bytes in (1, 2**27):
        head = head_gradients(
            case.normed_RTD,
            case.weight_VD,
            case.labels_RT,
            case.valid_RT,
            case.candidates,
            case.vocab_size,
            chunk_bytes=chunk_bytes,
        )
        assert head.hidden_RTD.dtype == head.logits_MTV.dtype == dtype
        assert not head.logits_MTV[..., case.vocab_size :].any()
        assert not head.validation_VD[case.vocab_size :].any()
        torch.testing.assert_close(
            head.hidden_RTD.double(), hidden_RTD, rtol=0, atol=10 * TOLERANCE[dtype]
        )
        validation_VD = head.validation_VD.clone()
        ours = tied_embedding_products(
            head, case.normed_RTD, case.tokens_RT, case.lookup_RTD, chunk_bytes=chunk_bytes
        )
        assert_close(ours, plain, TOLERANCE[dtype])
        assert torch.equal(head.validation_VD, validation_VD)
    for now, then in zip((case.weight_VD, case.normed_RTD, case.lookup_RTD), before, strict=True):
        assert torch.equal(now, then)


def test_lookup_and_head_meet() -> None:
    """What sequences share through one another's use of the embedding is in the products."""
    case = Tied((5, 3, 7, 4, 9), torch.float32)
    head = head_gradients(
        *(case.normed_RTD, case.weight_VD, case.labels_RT, case.valid_RT, 3, case.vocab_size)
    )
    both = tied_embedding_products(head, case.normed_RTD, case.tokens_RT, case.lookup_RTD)
    opposite = tied_embedding_products(head, case.normed_RTD, case.tokens_RT, -case.lookup_RTD)
    # Only the mixed terms change sign with the lookups.
    mixed = (both.pairs_MM - opposite.pairs_MM).abs().max()
    assert mixed > 0.01 * both.pairs_MM.abs().max()
