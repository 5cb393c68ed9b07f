"""The one-call selective head against plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_eslm.ops.head.functional import selective_linear_cross_entropy
from megatron_eslm.ops.keep_rule import num_to_keep

from ..harness import run_ranks
from .plain_head import Case, make_case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
UPSTREAM = -2.5
SHAPES = [(1, 1, 2), (13, 5, 17), (64, 16, 31)]

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Loss and the gradients of hidden states and weights, under UPSTREAM."""


def some_case(
    n: int, d: int, vocab_size: int, dtype: torch.dtype = torch.float32, ignored: bool = True
) -> Case:
    """With every fourth label, but the first, left out."""
    case = make_case(n, d, vocab_size, vocab_size, dtype)
    if ignored:
        case.labels_N[3::4] = -100
    return case


def plain(case: Case, alpha: float, score: str = "loss") -> Result:
    """By sorting, in float64, with torch's own cross-entropy and autograd."""
    hidden_ND = case.hidden_ND.double().requires_grad_()
    weight_VD = case.weight_VD.double().requires_grad_()
    logits_NV = hidden_ND @ weight_VD.t()
    loss_N = F.cross_entropy(logits_NV, case.labels_N, reduction="none")
    entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
    risk_N = (loss_N if score == "loss" else entropy_N).tolist()
    valid = [i for i, label in enumerate(case.labels_N.tolist()) if label != -100]
    kept = sorted(valid, key=lambda i: (-risk_N[i], i))[: num_to_keep(len(valid), alpha)]
    loss = loss_N[kept].mean()
    (UPSTREAM * loss).backward()
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    return loss.detach(), hidden_ND.grad, weight_VD.grad


def ours(case: Case, alpha: float, **kwargs: Any) -> Result:
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    weight_VD = case.weight_VD.clone().requires_grad_()
    before = case.clone()
    loss = selective_linear_cross_entropy(
        hidden_ND, weight_VD, case.labels_N, alpha=alpha, **kwargs
    )
    (UPSTREAM * loss).backward()
    case.assert_equal(before)
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    assert loss.dtype == torch.float32 and hidden_ND.grad.dtype == hidden_ND.dtype
    return loss.detach(), hidden_ND.grad, weight_VD.grad


def assert_near(got: Result, wanted: Result, tolerance: float) -> None:
    for a, b in zip(got, wanted, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep_logits", [False, True])
def test_value_and_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, keep_logits: bool
) -> None:
    case = some_case(*shape, dtype)
    for alpha in (0.0, 0.1, 0.5):
        for score in ("loss", "entropy"):
            wanted = plain(case, alpha, score)
            got = ours(case, alpha, score=score, keep_logits=keep_logits)
            assert_near(got, wanted, TOLERANCE[dtype])


def test_alpha_0_is_torchs_cross_entropy() -> None:
    case = some_case(64, 16, 31)
    got = selective_linear_cross_entropy(case.hidden_ND, case.weight_VD, case.labels_N, alpha=0.0)
    torch.testing.assert_close(
        got, F.cross_entropy(case.hidden_ND @ case.weight_VD.t(), case.labels_N)
    )


def test_another_ignored_label() -> None:
    case = some_case(13, 5, 17)
    other = case.clone()
    other.labels_N[other.labels_N == -100] = 4
    case.labels_N[case.labels_N == 4] = -100
    got = ours(other, 0.3, ignore_index=4)
    assert_near(got, plain(case, 0.3), 1e-5)


@pytest.mark.parametrize("n", [0, 5])
def test_no_labels_no_loss(n: int) -> None:
    case = make_case(5, 3, 7, 7)
    case = Case(case.hidden_ND[:n], case.weight_VD, torch.full((n,), -100), 7)
    for result in ours(case, 0.5):
        assert torch.equal(result, torch.zeros_like(result))


def test_a_frozen_head() -> None:
    case = some_case(13, 5, 17)
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    loss = selective_linear_cross_entropy(hidden_ND, case.weight_VD, case.labels_N, alpha=0.3)
    (UPSTREAM * loss).backward()
    assert hidden_ND.grad is not None
    assert_near((loss.detach(), hidden_ND.grad), plain(case, 0.3)[:2], 1e-5)  # type: ignore[arg-type]


def test_ranks_share_one_threshold() -> None:
    """Shares of the loss and of gradients add up, also where a rank keeps nothing."""
    case = some_case(24, 8, 19)
    case.hidden_ND[12:] *= 0.01  # of even predictions: no loss there is high
    case.hidden_ND[:12] *= 5.0
    wanted = plain(case, 0.75)

    def on_rank(rank: int) -> Result:
        mine = slice(12 * rank, 12 * rank + 12)
        part = Case(case.hidden_ND[mine], case.weight_VD, case.labels_N[mine], 19)
        return ours(part, 0.75, group=dist.group.WORLD)

    shares = run_ranks(2, on_rank)
    loss, weight = (shares[0][i] + shares[1][i] for i in (0, 2))
    hidden = torch.cat([shares[0][1], shares[1][1]])
    assert_near((loss, hidden, weight), wanted, 1e-5)
    assert shares[1][0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 7])}, "labels lie outside of the 7 rows"),
        ({"labels": torch.tensor([0, -1, 2])}, "labels lie outside of the 7 rows"),
        ({"labels": torch.tensor([0, 1])}, r"hidden \[3, 5\].* do not fit together"),
        ({"labels": torch.tensor([0, 1, 2]).int()}, "labels are torch.int32"),
        ({"weight": torch.zeros(7, 4)}, r"weight \[7, 4\].* do not fit together"),
        ({"weight": torch.zeros(7, 5).bfloat16()}, "cast them to one"),
        ({"alpha": 1.0}, r"alpha 1.0 is outside \[0, 1\)"),
        ({"alpha": float("nan")}, "alpha nan is outside"),
        ({"score": "margin"}, "'margin' is not one of loss, entropy"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    inputs = {
        "hidden": torch.zeros(3, 5),
        "weight": torch.zeros(7, 5),
        "labels": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        selective_linear_cross_entropy(**{**inputs, **change})
