"""Validation loss against a plain loop over the validation set with an ordinary head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_eslm.model.gpt import reference_logits
from megatron_eslm.training.callbacks import Evaluator
from megatron_eslm.training.evaluate import Evaluation, evaluate
from tests.harness import run_ranks

from .runs import build, weights_of, words


def assert_same(found: Evaluation, expected: Evaluation) -> None:
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert list(found.loss_by_domain) == list(expected.loss_by_domain)
    assert found.loss_by_domain == pytest.approx(expected.loss_by_domain, abs=1e-5)


@pytest.mark.parametrize("flags", [(), ("--eod-mask-loss",), ("--selection", "random")])
def test_evaluation_is_the_mean_over_all_valid_tokens(
    data: list[str], flags: tuple[str, ...]
) -> None:
    def fn(rank: int) -> tuple[list[Evaluation], Evaluation, bool]:
        trainer = build(words(data, *flags, "--eslm-alpha", "0.5", iters=3, micro_batch_size=5))
        trainer.train()
        valid = trainer.datasets.valid
        assert valid is not None
        items = [valid[i] for i in range(len(valid))]
        tokens = torch.stack([item["tokens"] for item in items])
        mask = torch.stack([item["valid"] for item in items])
        logits = reference_logits(
            weights_of(trainer), trainer.engine.ds.module.shape, tokens[:, :-1]
        )
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        domain = torch.tensor([item["domain"] for item in items])
        assert [valid.domain_of(i) for i in range(len(valid))] == domain.tolist()
        expected = Evaluation(
            float(losses[mask].double().mean()),
            {
                name: float(losses[domain == d][mask[domain == d]].double().mean())
                for d, name in enumerate(("prose", "code"))
            },
        )
        # Any micro-batch size, also one larger than the set.
        sizes = [evaluate(trainer.engine, valid, trainer.mesh, m) for m in (1, 3, 64)]
        assert trainer.recorder.take() == []  # evaluation leaves no trace
        assert trainer.engine.ds.module.training
        return sizes, expected, bool(mask.all())

    sizes, expected, all_valid = run_ranks(1, fn)[0]
    assert abs(expected.loss_by_domain["prose"] - expected.loss_by_domain["code"]) > 1e-2
    for found in sizes:
        assert_same(found, expected)
    assert all_valid == ("--eod-mask-loss" not in flags)


def test_every_layout_finds_the_same_losses_of_domains(data: list[str]) -> None:
    """Also a pipeline's stages that read no batch, and a set that does not divide over ranks."""

    def on_rank(rank: int, rows: int, *layout: str | int) -> Evaluation:
        flags = ("--num-layers", 4, "--selection", "clm", "--eval-iters", 1000)
        flags += ("--split", "90,10,0", *layout)
        trainer = build(words(data, *flags, micro_batch_size=rows))
        return Evaluator().evaluate(trainer)

    (expected,) = run_ranks(1, on_rank, 8)
    assert set(expected.loss_by_domain) == {"prose", "code"}
    for world, rows, layout in (
        (2, 5, ()),
        (2, 4, ("--tensor-model-parallel-size", 2)),
        (3, 4, ("--pipeline-model-parallel-size", 3)),
    ):
        for found in run_ranks(world, on_rank, rows, *layout):
            assert_same(found, expected)


def test_a_domain_that_the_set_does_not_hold_has_no_loss(data: list[str]) -> None:
    def on_rank(rank: int) -> Evaluation:
        # The blending rule gives the second sequence to the domain that has none yet.
        trainer = build(words(data, "--eval-iters", 1, micro_batch_size=1))
        evaluation = Evaluator().evaluate(trainer)
        assert evaluation is not None
        return evaluation

    (found,) = run_ranks(1, on_rank)
    assert found.loss_by_domain == {"prose": pytest.approx(found.loss)}
