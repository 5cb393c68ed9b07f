"""The head as anyone would write it: full float64 logits, torch's own autograd.

Shape legend: N tokens, D hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Case:
    """Inputs of one head."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    labels_N: torch.Tensor
    vocab_size: int

    def clone(self) -> Case:
        return Case(
            self.hidden_ND.clone(), self.weight_VD.clone(), self.labels_N.clone(), self.vocab_size
        )

    def assert_equal(self, other: Case) -> None:
        assert torch.equal(self.hidden_ND, other.hidden_ND)
        assert torch.equal(self.weight_VD, other.weight_VD)
        assert torch.equal(self.labels_N, other.labels_N)


def make_case(
    n: int,
    d: int,
    vocab_size: int,
    padded: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Case:
    """Random inputs; the padding rows of the head are large, so that one that counts is seen."""
    rng = torch.Generator().manual_seed(1000 * n + 100 * d + padded)
    weight_VD = torch.randn(padded, d, generator=rng)
    weight_VD[vocab_size:] = 50.0
    hidden_ND = scale * torch.randn(n, d, generator=rng)
    labels_N = torch.randint(vocab_size, (n,), generator=rng)
    if n >= 2:  # the first and the last token of the vocabulary
        labels_N[0], labels_N[1] = 0, vocab_size - 1
    return Case(hidden_ND.to(dtype), weight_VD.to(dtype), labels_N, vocab_size)


def plain_head(case: Case, *, gradient: bool = False) -> tuple[torch.Tensor, ...]:
    """(loss, entropy, logsumexp, hidden, weight), float64; the last two are leaves."""
    hidden_ND = case.hidden_ND.double().requires_grad_(gradient)
    weight_VD = case.weight_VD.double().requires_grad_(gradient)
    logits_NV = (hidden_ND @ weight_VD.t())[:, : case.vocab_size]
    log_p_NV = logits_NV.log_softmax(dim=1)
    loss_N = -log_p_NV.gather(1, case.labels_N[:, None]).squeeze(1)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=1)
    return loss_N, entropy_N, logits_NV.logsumexp(dim=1), hidden_ND, weight_VD


@dataclass
class Observed:
    """What was computed while `observe` was active."""

    largest_float32: int = 0
    """Elements of the largest float32 tensor that an operation returned."""
    products: list[tuple[int, int, int]] = field(default_factory=list)
    """(rows, inner, columns) of every matrix product."""

    @property
    def multiply_adds(self) -> int:
        return sum(a * b * c for a, b, c in self.products)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.observed = Observed()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            assert a.dim() == b.dim() == 2, name
            self.observed.products.append((a.shape[0], a.shape[1], b.shape[1]))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.observed.largest_float32 = max(self.observed.largest_float32, x.numel())
        return result


@contextmanager
def observe() -> Iterator[Observed]:
    """Record products and sizes of every operation, those of backward passes included."""
    with _Recording() as recording:
        yield recording.observed
