"""The Triton forms of the head in Triton's interpreter; test_head_triton.py runs this file.

The interpreter is chosen when Triton is imported, so these tests have a process of their own.
Besides a few that are about tiles, they are those of the PyTorch form: all that `head_statistics`
and `kept_linear_cross_entropy` promise, they promise with every kernel. The interpreter cuts
float32 to bfloat16 off where a GPU rounds; tolerances of bfloat16 have room for it.
"""

from __future__ import annotations

import os

import pytest
import torch

from megatron_eslm.ops.head import dispatch, triton_fused_kernel, triton_kernel
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics

from ..model.small import make_batch, run_step, small_gpt
from . import test_head_statistics as of_statistics
from . import test_kept_linear_cross_entropy as of_gradients
from .plain_head import make_case

assert os.environ["TRITON_INTERPRET"] == "1"

KERNELS = ["triton", "triton-fused"]

# Tests of the PyTorch form, but those that are about its own operations.
test_statistics_of_the_rounded_logits = (
    of_statistics.test_the_statistics_are_those_of_the_rounded_logits_and_no_worse
)
test_entropy_only_on_request = (
    of_statistics.test_entropy_only_on_request_and_without_effect_on_the_loss
)
test_statistics_of_no_tokens = of_statistics.test_no_tokens
test_statistics_of_extreme_logits = of_statistics.test_extreme_logits
test_nan_stays_with_its_token = of_statistics.test_nan_stays_with_its_token
test_statistics_of_shards = of_statistics.test_shards_agree_with_one_process
test_nan_in_one_shard_reaches_all = of_statistics.test_nan_in_one_shard_reaches_all
test_a_frozen_head = (
    of_gradients.test_a_frozen_head_has_no_gradient_and_the_hidden_states_have_theirs
)
test_gradients_of_no_tokens = of_gradients.test_no_tokens_at_all
test_gradients_of_extreme_logits = of_gradients.test_extreme_logits
test_backward_changes_nothing_it_was_given = of_gradients.test_backward_changes_nothing_it_was_given
test_gradients_of_shards = of_gradients.test_shards_agree_with_one_process


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small shapes have several tiles, the last of them in part."""
    monkeypatch.setattr(triton_kernel, "COLUMNS", 16)
    tile = triton_fused_kernel.Tile(16, 16, 16)
    monkeypatch.setattr(triton_fused_kernel, "TILES", {2: tile, 4: tile})
    monkeypatch.setattr(triton_fused_kernel, "PROGRAMS", 4)


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `auto` is in this test; tests of the PyTorch form know of no other."""
    resolve = dispatch.resolve_head_kernel

    def resolved(kernel: str, device_type: str) -> str:
        return resolve(request.param if kernel == "auto" else kernel, device_type)

    monkeypatch.setattr(dispatch, "resolve_head_kernel", resolved)
    return request.param


@pytest.mark.parametrize("dtype", of_statistics.TOLERANCE, ids=str)
def test_statistics_against_full_logits(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1, 1), (13, 5, 17, 24), (7, 33, 50, 50)):
        of_statistics.test_against_full_logits(shape, 5, dtype)


@pytest.mark.parametrize("dtype", of_gradients.TOLERANCE, ids=str)
@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
def test_gradients_against_autograd(keep_logits: bool, dtype: torch.dtype) -> None:
    for shape in ((1, 1, 2, 2), (13, 5, 17, 24)):
        for which in ("none", "some", "all"):
            of_gradients.test_against_autograd(shape, which, keep_logits, dtype)


def everything(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, keep_logits: bool
) -> list[torch.Tensor]:
    """Statistics and gradients of one case whose tokens, vocabulary and width fill no tile."""
    monkeypatch.setattr(dispatch, "resolve_head_kernel", lambda *_: kernel)
    case = make_case(21, 35, 42, 48, dtype=dtype, scale=0.3)
    got = of_statistics.statistics(case, 5, keep_logits=keep_logits)
    run = of_gradients.run(
        case,
        of_gradients.kept_of(21, "some"),
        VocabShard.of(42, 48),
        keep_logits=keep_logits,
        chunk_tokens=5,
    )
    assert got.entropy_N is not None
    return [got.loss_N, got.entropy_N, got.log_sum_exp_N, *run]


@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_in_pytorch_and_the_same_bits_twice(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, keep_logits: bool
) -> None:
    plain = everything(monkeypatch, "torch", dtype, keep_logits)
    first, second = (everything(monkeypatch, kernel, dtype, keep_logits) for _ in range(2))
    for mine, again, other in zip(first, second, plain, strict=True):
        assert torch.equal(mine, again)
        assert mine.dtype == other.dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        of_gradients.assert_close_in_norm(mine, other, tolerance)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    case = make_case(20, 19, 45, 48)
    case.hidden_ND[17, 3] = bad
    got = of_statistics.statistics(case)
    assert got.entropy_N is not None
    for values_N in (got.loss_N, got.entropy_N):
        assert values_N.isnan().tolist() == [i == 17 for i in range(20)]


@pytest.mark.parametrize("keep_logits", [False, True], ids=["recompute", "keep"])
def test_the_same_is_selected(
    monkeypatch: pytest.MonkeyPatch, process_group: None, kernel: str, keep_logits: bool
) -> None:
    """By the loss and by the entropy, instances and tokens."""
    batch = make_batch(8, padding=True)
    for score in ("loss", "entropy"):
        steps = []
        for name in ("torch", kernel):
            monkeypatch.setattr(dispatch, "resolve_head_kernel", lambda *_, name=name: name)
            model, recorder = small_gpt(keep_logits=keep_logits, alpha=0.3, eslm_score=score)
            steps.append(run_step(model, recorder, batch))
        plain, mine = steps
        assert 0 < len(mine.kept_tokens) < int(batch.valid_MT.sum())
        assert mine.kept_rows == plain.kept_rows
        assert mine.kept_tokens == plain.kept_tokens
        assert mine.loss == pytest.approx(plain.loss, rel=1e-6)
        for name, gradient in plain.gradients.items():
            of_gradients.assert_close_in_norm(mine.gradients[name], gradient, 1e-5)


def test_a_tile_of_nothing_but_minus_infinity_is_no_nan() -> None:
    """As float16 logits may overflow to; the first tile is such a one."""
    weight_VD = torch.cat([torch.full((20, 2), -torch.inf), torch.randn(25, 2)])
    labels_N = torch.tensor([30, 44, 20])
    hidden_ND = torch.rand(3, 2) + 0.1
    got = head_statistics(hidden_ND, weight_VD, labels_N, VocabShard.of(45, 45), entropy=False)
    lse_N = (hidden_ND @ weight_VD.t()).logsumexp(dim=1)
    torch.testing.assert_close(got.log_sum_exp_N, lse_N)
    assert got.loss_N.isfinite().all()
