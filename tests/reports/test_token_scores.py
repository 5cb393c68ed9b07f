"""Scores of tokens against ordinary logits of the same model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import reference_logits
from megatron_eslm.reports.passages import passages_of_text
from megatron_eslm.reports.token_scores import open_scoring_model, window_of
from tests.harness import run_ranks

from .models import save_model


def test_scores_are_those_of_plain_logits(tmp_path):
    weights, shape = save_model(tmp_path / "run")

    def on_rank(rank: int) -> None:
        model = open_scoring_model(str(tmp_path / "run"))
        assert (model.name, model.context) == ("run, iteration 0", 24)
        # Passages of unequal length, in batches that they do not divide into.
        text = "the quick fox, and the lazy dog; " * 3
        passages = passages_of_text(text, "x", ByteTokenizer(), 20)
        assert len({len(p.ids) for p in passages}) == 2 and len(passages) == 5
        scores = model.score(passages, batch_size=2)
        for passage, found in zip(passages, scores, strict=True):
            ids = torch.from_numpy(passage.ids)
            context = torch.cat([torch.tensor([passage.before]), ids[:-1]])
            logits = reference_logits(weights, shape, context[None])[0]
            loss = F.cross_entropy(logits, ids, reduction="none")
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            np.testing.assert_allclose(found.loss, loss, atol=1e-4)
            np.testing.assert_allclose(found.entropy, entropy, atol=1e-4)
            assert found.loss.dtype == np.float32

    run_ranks(1, on_rank)


def test_a_hugging_face_folder_scores_like_its_checkpoint(tmp_path):
    from megatron_eslm.interop.huggingface import export

    weights, shape = save_model(tmp_path / "run")
    export(tmp_path / "hf", weights, shape, ByteTokenizer())

    def on_rank(rank: int) -> None:
        passages = passages_of_text("the quick fox", "x", ByteTokenizer(), 20)
        ours, theirs = (
            open_scoring_model(str(tmp_path / name)).score(passages)[0] for name in ("run", "hf")
        )
        np.testing.assert_allclose(ours.loss, theirs.loss, atol=1e-5)
        np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-5)

    run_ranks(1, on_rank)
    with pytest.raises(ConfigError, match="is a Hugging Face folder and has no tag x"):
        open_scoring_model(str(tmp_path / "hf"), "x")


def test_what_cannot_be_scored(tmp_path):
    with pytest.raises(ConfigError, match=r"^--load .*none: there is no such folder"):
        open_scoring_model(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"^--load-b: .*none"):
        open_scoring_model(str(tmp_path / "none"), flag="--load-b")
    save_model(tmp_path / "mute", tokenizer=None)
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        open_scoring_model(str(tmp_path / "mute"))


def test_window(tmp_path):
    save_model(tmp_path / "run")
    model = open_scoring_model(str(tmp_path / "run"))
    assert window_of([model], None) == 24 and window_of([model], 7) == 7
    for wanted in (0, 25):
        with pytest.raises(ConfigError, match=f"--seq-length {wanted} must be from 1 to 24"):
            window_of([model], wanted)
