"""Rho-1 in the model, beside its formulas in float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from megatron_eslm.data.batch import Batch
from megatron_eslm.errors import ConfigError

from .reference import algorithm1, losses_and_entropies, riskiest
from .small import CONFIG, POSITIONS, make_batch, small_gpt

ROWS, ALPHA = 6, 0.3

pytestmark = pytest.mark.usefixtures("process_group")


def explicit(model, batch, reference_MT):
    """(excess by (row, position), what is kept, the step that trains on just that)."""
    weights = dict(model.named_parameters())
    double = {name: x.detach().double() for name, x in weights.items()}
    excess = {}
    for row in range(ROWS):
        loss_T, _ = losses_and_entropies(batch.tokens_MU[row], double, CONFIG, CONFIG.num_layers)
        for t in range(POSITIONS):
            if batch.valid_MT[row, t]:
                excess[row, t] = (loss_T[t] - reference_MT[row, t]).item()
    kept = set(riskiest(excess, ALPHA))
    step = algorithm1(
        weights,
        CONFIG,
        batch.tokens_MU,
        batch.valid_MT,
        alpha=ALPHA,
        choose_tokens=lambda row, t: (row, t) in kept,
    )
    return excess, kept, step


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "online"])
@pytest.mark.parametrize("padding", [False, True])
def test_the_tokens_of_largest_excess_loss_are_trained_on(stored: bool, padding: bool) -> None:
    model, recorder = small_gpt(selection="rho1", alpha=ALPHA)
    batch = make_batch(ROWS, padding=padding)
    rng = torch.Generator().manual_seed(5)
    reference_MT = 8 * torch.rand(ROWS, POSITIONS, generator=rng)
    excess, kept, expected = explicit(model, batch, reference_MT)
    assert kept != set(expected.token_scores)  # some are dropped,
    assert kept != set(riskiest(expected.token_scores, ALPHA))  # and not those of least loss
    tensors = [batch.tokens_MU, batch.valid_MT, batch.tokens_MU[:, 1:]]
    if stored:
        tensors.append(reference_MT)
    else:
        asked = []
        model.policy.reference = lambda batch: asked.append(batch) or reference_MT
    loss = model(*tensors)
    loss.backward()
    (record,) = recorder.take()
    assert {tuple(place) for place in record.token_kept_MT.nonzero().tolist()} == kept
    for place, value in excess.items():
        assert record.token_scores_MT[place].item() == pytest.approx(value, abs=1e-4)
    assert torch.equal(record.token_scores_MT.isnan(), ~batch.valid_MT)
    assert record.instance_scores_M is None and record.num_rows_kept == ROWS
    assert record.tau_token == pytest.approx(min(excess[place] for place in kept), abs=1e-4)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        gradient = expected.gradients[name].float()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    if not stored:
        (seen,) = asked
        assert isinstance(seen, Batch) and torch.equal(seen.tokens_MU, batch.tokens_MU)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_reference_loss_that_is_not_finite_is_seen(bad: float) -> None:
    model, recorder = small_gpt(selection="rho1", alpha=ALPHA)
    batch = make_batch(ROWS)
    reference_MT = torch.rand(ROWS, POSITIONS)
    reference_MT[4, 2] = bad
    loss = model(batch.tokens_MU, batch.valid_MT, batch.tokens_MU[:, 1:], reference_MT)
    (record,) = recorder.take()
    assert record.num_nonfinite == 1 and record.token_kept_MT[4, 2]
    assert record.nonfinite_rows_M.tolist() == [row == 4 for row in range(ROWS)]
    assert loss.isnan()


def test_rows_without_any_label_are_passed_over() -> None:
    model, recorder = small_gpt(selection="rho1", alpha=ALPHA)
    batch = make_batch(ROWS)
    nothing_MT = torch.zeros_like(batch.valid_MT)
    reference_MT = torch.rand(ROWS, POSITIONS)
    loss = model(batch.tokens_MU, nothing_MT, batch.tokens_MU[:, 1:], reference_MT)
    loss.backward()
    (record,) = recorder.take()
    assert loss.item() == 0.0 and record.num_tokens_kept == record.num_nonfinite == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_alpha_zero_is_plain_training() -> None:
    batch = make_batch(ROWS)
    reference_MT = torch.rand(ROWS, POSITIONS)
    labels_MT = batch.tokens_MU[:, 1:]
    rho1, _ = small_gpt(selection="rho1", alpha=0.0)
    clm, _ = small_gpt(selection="clm", alpha=0.0)
    loss = rho1(batch.tokens_MU, batch.valid_MT, labels_MT, reference_MT)
    assert loss.item() == clm(batch.tokens_MU, batch.valid_MT).item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eslm_level": "instance"}, "--eslm-level instance leaves --selection rho1 nothing to"),
        ({"eslm_score": "entropy"}, "--eslm-score entropy has no meaning with --selection rho1"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_gpt(selection="rho1", **options)
