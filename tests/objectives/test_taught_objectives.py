"""Distillation and uncertainty objectives in a whole model, against plain float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_eslm.frozen.model import FrozenModel
from megatron_eslm.model.gpt import GPT
from megatron_eslm.objectives.base import Objective
from megatron_eslm.objectives.distillation import Distillation
from megatron_eslm.objectives.uncertainty import Uncertainty
from megatron_eslm.selection.state import Recorder
from tests.model.reference import Config, algorithm1, logits_of
from tests.model.small import (
    CONFIG,
    SHAPE,
    Batch,
    Step,
    make_batch,
    relative_difference,
    run_step,
    small_gpt,
)

pytestmark = pytest.mark.usefixtures("process_group")

TEACHER_SHAPE = dataclasses.replace(
    SHAPE,
    num_layers=2,
    hidden_size=30,
    num_attention_heads=3,
    ffn_hidden_size=20,
    max_position_embeddings=15,
)
TEACHER_CONFIG = Config(num_layers=2, num_heads=3, vocab_size=SHAPE.vocab_size)


def small_teacher() -> tuple[FrozenModel, dict[str, torch.Tensor]]:
    """A teacher of another shape, and its weights."""
    model, _ = small_gpt(seed=7, shape=TEACHER_SHAPE, selection="clm", alpha=0.0)
    return FrozenModel(model), dict(model.named_parameters())


def student(objective: Objective | None, **options) -> tuple[GPT, Recorder]:
    model, recorder = small_gpt(**options)
    if objective is not None:
        model.head.objective = objective
    return model, recorder


def plain_step(
    model: GPT,
    teacher: dict[str, torch.Tensor],
    batch: Batch,
    tokens: list[tuple[int, int]],
    kl_weight: dict[tuple[int, int], float],
    rho: float,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients over `tokens`, with torch's own functions on full float64 logits."""
    w = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    v = {n: p.detach().double() for n, p in teacher.items()}
    total = torch.zeros((), dtype=torch.float64)
    for row, tokens_S in enumerate(batch.tokens_MU):
        z_TV = logits_of(tokens_S[:-1], w, CONFIG, CONFIG.num_layers)
        teacher_TV = logits_of(tokens_S[:-1], v, TEACHER_CONFIG, TEACHER_CONFIG.num_layers)
        p_TV = (teacher_TV / rho).softmax(1)
        kl_T = (p_TV * (p_TV.log() - (z_TV / rho).log_softmax(1))).sum(1)
        ce_T = F.cross_entropy(z_TV, tokens_S[1:], reduction="none")
        for t in range(len(ce_T)):
            if (row, t) in kl_weight:
                weight = kl_weight[row, t]
                total = total + weight * kl_T[t] + (1 - weight) * ce_T[t]
    loss = total / len(tokens)
    gradients = torch.autograd.grad(loss, list(w.values()))
    return loss.item(), dict(zip(w, gradients, strict=True))


def assert_same(step: Step, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    assert step.loss == pytest.approx(loss, abs=1e-5)
    worst = {name: relative_difference(step.gradients[name], gradients[name]) for name in gradients}
    assert max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("score", ["loss", "entropy"])
@pytest.mark.parametrize(("weight", "rho"), [(0.5, 1.0), (0.3, 2.0), (1.0, 0.5)])
def test_algorithm_3(weight: float, rho: float, score: str, padding: bool) -> None:
    teacher, teacher_weights = small_teacher()
    objective = Distillation(teacher, weight=weight, temperature=rho)
    batch = make_batch(8, padding=padding)
    model, recorder = student(objective, alpha=0.2, eslm_score=score)
    step = run_step(model, recorder, batch)
    chosen = algorithm1(
        dict(model.named_parameters()),
        CONFIG,
        batch.tokens_MU,
        batch.valid_MT,
        alpha=0.2,
        score=score,
    ).kept_tokens
    assert step.kept_tokens == chosen  # the student's scores, not the teacher's
    loss, gradients = plain_step(
        model, teacher_weights, batch, chosen, dict.fromkeys(chosen, weight), rho
    )
    assert_same(step, loss, gradients)


def test_dense_is_over_all_tokens() -> None:
    teacher, teacher_weights = small_teacher()
    batch = make_batch(5, padding=True)
    model, recorder = student(
        Distillation(teacher, weight=0.4, temperature=1.0), selection="clm", alpha=0.0
    )
    step = run_step(model, recorder, batch)
    everything = [tuple(x) for x in batch.valid_MT.nonzero().tolist()]
    assert step.kept_tokens == everything
    loss, gradients = plain_step(
        model, teacher_weights, batch, everything, dict.fromkeys(everything, 0.4), 1.0
    )
    assert_same(step, loss, gradients)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
def test_uncertainty_learns_the_quantile_and_holds_the_rest(padding: bool) -> None:
    teacher, teacher_weights = small_teacher()
    batch = make_batch(6, padding=padding)
    model, recorder = student(Uncertainty(teacher), selection="uncertainty", alpha=0.75)
    step = run_step(model, recorder, batch)
    learned = algorithm1(
        dict(model.named_parameters()),
        CONFIG,
        batch.tokens_MU,
        batch.valid_MT,
        alpha=0.75,
        level="token",
    ).kept_tokens
    everything = [tuple(x) for x in batch.valid_MT.nonzero().tolist()]
    assert step.kept_tokens == learned
    assert step.record.num_tokens_kept == len(everything)
    assert len(learned) == len(everything) // 4
    weights = {key: 0.0 if key in learned else 1.0 for key in everything}
    loss, gradients = plain_step(model, teacher_weights, batch, everything, weights, 1.0)
    assert_same(step, loss, gradients)


def test_salt_is_causal_language_modelling_from_its_last_step_on() -> None:
    class Absent:
        weight_VE = None

        def hidden(self, tokens_MU: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the teacher ran")

    batch = make_batch(4)
    options = {"selection": "clm", "alpha": 0.0}
    salt = Distillation(Absent(), weight=0.5, temperature=1.0, num_iterations=3)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="the teacher ran"):
        run_step(*student(salt, iteration=2, **options), batch)
    step = run_step(*student(salt, iteration=3, **options), batch)
    plain = run_step(*student(None, iteration=3, **options), batch)
    assert step.loss == plain.loss
    assert all(torch.equal(step.gradients[n], plain.gradients[n]) for n in plain.gradients)
