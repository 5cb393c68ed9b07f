"""Validation loss against a plain loop over the validation set with an ordinary head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_eslm.model.gpt import reference_logits
from megatron_eslm.training.evaluate import evaluate
from tests.harness import run_ranks

from .runs import build, weights_of, words


@pytest.mark.parametrize("flags", [(), ("--eod-mask-loss",), ("--selection", "random")])
def test_evaluation_is_the_mean_over_all_valid_tokens(
    data: list[str], flags: tuple[str, ...]
) -> None:
    def fn(rank: int) -> tuple[float, float, bool]:
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
        expected = float(losses[mask].double().mean())
        # Any micro-batch size, also one larger than the set.
        sizes = [evaluate(trainer.engine, valid, trainer.mesh, m) for m in (1, 3, 64)]
        assert trainer.recorder.take() == []  # evaluation leaves no trace
        assert trainer.engine.ds.module.training
        return sizes, expected, bool(mask.all())

    sizes, expected, all_valid = run_ranks(1, fn)[0]
    for loss in sizes:
        assert loss == pytest.approx(expected, abs=1e-5)
    assert all_valid == ("--eod-mask-loss" not in flags)
