"""The model against an independent float64 reading of Algorithm 1 (reference.py)."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_eslm.selection.state import Recorder

from .reference import Outcome, algorithm1
from .small import (
    CONFIG,
    POSITIONS,
    Batch,
    Step,
    make_batch,
    relative_difference,
    run_step,
    small_gpt,
)

pytestmark = pytest.mark.usefixtures("process_group")


def assert_same(step: Step, outcome: Outcome) -> None:
    assert step.kept_rows == outcome.kept_rows
    assert step.kept_tokens == outcome.kept_tokens
    assert step.loss == pytest.approx(outcome.loss.item(), abs=1e-5)
    assert step.gradients.keys() == outcome.gradients.keys()
    worst = {
        name: relative_difference(step.gradients[name], outcome.gradients[name])
        for name in outcome.gradients
    }
    assert max(worst.values()) < 1e-4, worst


def run_both(batch: Batch, **options) -> tuple[Step, Outcome]:
    model, recorder = small_gpt(**options)
    step = run_step(model, recorder, batch)
    plain = {
        "alpha": options["alpha"],
        "score": options.get("eslm_score", "loss"),
        "level": options.get("eslm_level", "both"),
        "proxy_layers": options.get("eslm_proxy_layers", 1),
        "stride": options.get("eslm_proxy_stride", 1),
    }
    weights = dict(model.named_parameters())
    outcome = algorithm1(weights, CONFIG, batch.tokens_MU, batch.valid_MT, **plain)
    return step, outcome


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("level", ["both", "instance", "token"])
@pytest.mark.parametrize("score", ["loss", "entropy"])
@pytest.mark.parametrize("rows", [8, 12])
def test_levels_and_scores(rows: int, score: str, level: str, padding: bool) -> None:
    batch = make_batch(rows, padding=padding)
    step, outcome = run_both(batch, alpha=0.1, eslm_score=score, eslm_level=level)
    assert_same(step, outcome)
    num_rows = rows - padding  # one row has no valid position
    expected = rows if level == "token" else {7: 6, 8: 7, 11: 9, 12: 10}[num_rows]
    assert step.record.num_rows_kept == len(step.kept_rows) == expected
    in_kept_rows = int(batch.valid_MT[step.kept_rows].sum())
    kept = in_kept_rows if level == "instance" else math.floor(0.9 * in_kept_rows + 1e-9)
    assert step.record.num_tokens_kept == len(step.kept_tokens) == kept


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@pytest.mark.parametrize("proxy_layers", [1, 2])
@pytest.mark.parametrize("score", ["loss", "entropy"])
def test_depths_and_levels_of_confidence(score: str, proxy_layers: int, alpha: float) -> None:
    batch = make_batch(8, seed=1, padding=True)
    options = {"eslm_score": score, "eslm_proxy_layers": proxy_layers, "alpha": alpha}
    assert_same(*run_both(batch, **options))


@pytest.mark.parametrize("keep_logits", [True, False])
def test_memory_modes_of_the_head(keep_logits: bool) -> None:
    assert_same(*run_both(make_batch(8, seed=2), alpha=0.3, keep_logits=keep_logits))


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("level", ["both", "instance", "token"])
@pytest.mark.parametrize("score", ["loss", "entropy"])
def test_ties(score: str, level: str, padding: bool, alpha: float) -> None:
    """Rows are copies of two: both thresholds fall among equal scores."""
    batch = make_batch(8, seed=3, ties=True)
    if padding:
        batch.valid_MT[4:6] = False
        batch.valid_MT[:, -3:] = False
    options = {"eslm_score": score, "eslm_level": level, "alpha": alpha}
    step, outcome = run_both(batch, **options)
    assert_same(step, outcome)
    if level != "token":
        scores_M = step.record.instance_scores_M
        assert len(set(scores_M[batch.valid_MT.any(dim=1)].tolist())) == 2


@pytest.mark.parametrize("stride", [2, 3, 20])
def test_a_stride_scores_every_so_manyth_position(stride: int) -> None:
    batch = make_batch(8, seed=4, padding=True)
    batch.valid_MT[:, 0] = batch.valid_MT.any(dim=1)  # a score for every row at any stride
    step, outcome = run_both(batch, alpha=0.3, eslm_proxy_stride=stride)
    assert_same(step, outcome)
    scores_M = torch.tensor(outcome.instance_scores)
    torch.testing.assert_close(step.record.instance_scores_M, scores_M, rtol=1e-5, atol=1e-5)


def test_the_record_says_what_happened() -> None:
    batch = make_batch(8, seed=5, padding=True)
    step, outcome = run_both(batch, alpha=0.3)
    record = step.record
    torch.testing.assert_close(
        record.instance_scores_M, torch.tensor(outcome.instance_scores), rtol=1e-5, atol=1e-5
    )
    tau = min(outcome.instance_scores[row] for row in outcome.kept_rows)
    assert record.tau_instance == pytest.approx(tau, abs=1e-5)
    scores = outcome.token_scores
    tau = min(scores[key] for key in outcome.kept_tokens)
    assert record.tau_token == pytest.approx(tau, abs=1e-5)
    cvar = tau + sum(max(0.0, s - tau) for s in scores.values()) / (0.7 * len(scores))
    assert record.cvar == pytest.approx(cvar, abs=1e-5)
    token_scores_MT = torch.full((8, POSITIONS), torch.nan)
    for (row, t), score in scores.items():
        token_scores_MT[row, t] = score
    torch.testing.assert_close(
        record.token_scores_MT, token_scores_MT, rtol=1e-5, atol=1e-5, equal_nan=True
    )
    assert record.num_rows == 8
    assert record.num_tokens == int(batch.valid_MT.sum())
    assert record.num_tokens_scored == len(outcome.kept_rows) * POSITIONS
    assert (record.num_nonfinite, record.nonfinite_rows_M.any().item()) == (0, False)


def test_the_batch_is_not_changed() -> None:
    batch = make_batch(8, padding=True)
    model, recorder = small_gpt(alpha=0.3)
    run_step(model, recorder, batch)
    again = make_batch(8, padding=True)
    assert torch.equal(batch.tokens_MU, again.tokens_MU)
    assert torch.equal(batch.valid_MT, again.valid_MT)


@pytest.mark.parametrize("level", ["both", "instance", "token"])
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
def test_random_has_the_gradient_of_its_own_choice(level: str, padding: bool) -> None:
    batch = make_batch(8, seed=6, padding=padding)
    model, recorder = small_gpt(selection="random", eslm_level=level, alpha=0.3)
    step = run_step(model, recorder, batch)
    chosen = set(step.kept_tokens)
    outcome = algorithm1(
        dict(model.named_parameters()),
        CONFIG,
        batch.tokens_MU,
        batch.valid_MT,
        alpha=0.3,
        choose_tokens=lambda row, t: (row, t) in chosen,
    )
    assert step.loss == pytest.approx(outcome.loss.item(), abs=1e-5)
    for name, gradient in outcome.gradients.items():
        assert relative_difference(step.gradients[name], gradient) < 1e-4, name
    assert {row for row, _ in chosen} <= set(step.kept_rows)
    assert step.record.num_tokens_kept == len(chosen)


def test_clm_is_the_mean_over_all_valid_tokens() -> None:
    batch = make_batch(8, seed=7, padding=True)
    model, recorder = small_gpt(selection="clm")
    step = run_step(model, recorder, batch)
    outcome = algorithm1(
        dict(model.named_parameters()), CONFIG, batch.tokens_MU, batch.valid_MT, alpha=0.0
    )
    assert step.kept_tokens == outcome.kept_tokens
    assert step.loss == pytest.approx(outcome.loss.item(), abs=1e-5)
    for name, gradient in outcome.gradients.items():
        assert relative_difference(step.gradients[name], gradient) < 1e-4, name


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    "options",
    [
        {"eslm_score": score, "eslm_level": level, "keep_logits": keep_logits}
        for score in ("loss", "entropy")
        for level in ("both", "instance", "token")
        for keep_logits in (True, False)
    ]
    + [{"selection": "random"}, {"eslm_proxy_stride": 3}, {"eslm_scope": "local"}],
    ids=lambda options: "-".join(str(x) for x in options.values()),
)
def test_alpha_zero_is_clm_to_the_last_bit(options: dict, padding: bool) -> None:
    batch = make_batch(8, seed=8)
    if padding:  # as end-of-document masking leaves it: some labels in every row
        batch.valid_MT[:, 4] = False
        batch.valid_MT[2:5, 6:] = False
    plain = run_step(
        *small_gpt(selection="clm", keep_logits=options.get("keep_logits", True)), batch
    )
    step = run_step(*small_gpt(alpha=0.0, **options), batch)
    assert step.loss == plain.loss
    assert step.kept_tokens == plain.kept_tokens
    for name, gradient in plain.gradients.items():
        assert torch.equal(step.gradients[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["loss", "entropy"])
def test_alpha_zero_is_clm_in_half_precision(score: str, dtype: torch.dtype) -> None:
    batch = make_batch(8, seed=8)
    steps = []
    for options in ({"selection": "clm"}, {"alpha": 0.0, "eslm_score": score}):
        model, recorder = small_gpt(**options)
        steps.append(run_step(model.to(dtype), recorder, batch))
    plain, step = steps
    assert step.loss == plain.loss
    for name, gradient in plain.gradients.items():
        assert gradient.dtype == dtype
        assert torch.equal(step.gradients[name], gradient), name


@pytest.mark.parametrize("selection", ["clm", "eslm", "random"])
def test_evaluation_is_the_mean_over_all_valid_tokens(selection: str) -> None:
    batch = make_batch(8, seed=9, padding=True)
    model, recorder = small_gpt(selection=selection, alpha=0.3)
    model.eval()
    with torch.no_grad():
        sums_M2 = model(batch.tokens_MU, batch.valid_MT)
    assert sums_M2[:, 1].tolist() == batch.valid_MT.sum(dim=1).tolist()
    total, count = sums_M2.sum(dim=0).tolist()
    outcome = algorithm1(
        dict(model.named_parameters()), CONFIG, batch.tokens_MU, batch.valid_MT, alpha=0.0
    )
    assert total / count == pytest.approx(outcome.loss.item(), abs=1e-5)
    assert recorder.take() == Recorder().take(), "evaluation left something in the record"


@pytest.mark.parametrize("selection", ["clm", "eslm", "random"])
def test_a_batch_without_any_label_has_zero_loss_and_gradients(selection: str) -> None:
    batch = make_batch(4)
    batch.valid_MT[:] = False
    step = run_step(*small_gpt(selection=selection, alpha=0.3), batch)
    assert step.loss == 0.0
    assert not any(gradient.any() for gradient in step.gradients.values())
    assert step.record.num_nonfinite == 0


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "clm"},
        {"eslm_score": "loss"},
        {"eslm_score": "entropy"},
        {"eslm_level": "instance"},
        {"eslm_level": "token"},
        {"selection": "random"},
    ],
    ids=str,
)
def test_a_sample_that_is_not_finite_is_named(options: dict) -> None:
    """Row 5 alone reads a token whose embedding is nan.

    The id lies in the padding of the vocabulary: the head is tied, and any other would make the
    losses of all rows nan.
    """
    batch = make_batch(8, seed=10)
    model, recorder = small_gpt(alpha=0.1, **options)
    batch.tokens_MU[5, 2] = 46
    batch.valid_MT[5, 1] = False  # it is no label
    with torch.no_grad():
        model.embedding.word.weight[46] = torch.nan
    step = run_step(model, recorder, batch)
    if options.get("selection") == "random" and 5 not in step.kept_rows:
        pytest.fail("choose another seed: the row was dropped at random")
    assert math.isnan(step.loss)
    assert step.record.num_nonfinite > 0
    assert step.record.nonfinite_rows_M.nonzero().flatten().tolist() == [5]
    assert any(not gradient.isfinite().all() for gradient in step.gradients.values())


def test_all_losses_not_finite_names_every_row() -> None:
    batch = make_batch(4)
    model, recorder = small_gpt(alpha=0.3)
    with torch.no_grad():
        model.embedding.word.weight[7] = torch.nan
    step = run_step(model, recorder, batch)
    assert math.isnan(step.loss)
    assert step.record.nonfinite_rows_M.all()
