"""Which documents reports take, and what they say where these may have been trained on."""

from __future__ import annotations

import logging

import pytest

from megatron_eslm.checkpoint.weights import Weights
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.held_out import HeldOut, held_out
from megatron_eslm.reports.token_scores import ScoringModel

from .models import random_model

SHAPE = random_model()[1]


def model(split: str | None, eod_mask_loss: bool = False) -> ScoringModel:
    data = None if split is None else {"split": split, "eod_mask_loss": eod_mask_loss}
    return ScoringModel(f"model {split}", Weights({}, SHAPE, None, 0, data), ByteTokenizer())


@pytest.mark.parametrize(
    ("splits", "wanted", "split", "warned"),
    [
        (["95,5,0"], None, "95,5,0", []),
        (["95,5,0"], "95,5,0", "95,5,0", []),
        (["95,5,0"], "0.95,0.05", "0.95,0.05", []),
        (["95,5,0"], "98,1,1", "98,1,1", ["model 95,5,0"]),
        (["95,5,0", "95,5"], None, "95,5,0", []),
        (["95,5,0", "98,1,1"], None, "95,5,0", ["model 98,1,1"]),
        ([None], None, "98,1,1", ["model None"]),
        ([None], "90,10", "90,10", ["model None"]),
        ([None, "95,5,0"], None, "95,5,0", ["model None"]),
    ],
)
def test_the_run_says_what_it_held_out(
    splits: list[str | None],
    wanted: str | None,
    split: str,
    warned: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert held_out([model(s) for s in splits], wanted) == HeldOut(split, False)
    assert [
        message.partition(" was ")[0].partition(":")[0] for message in caplog.messages
    ] == warned
    assert all("may have been trained on" in message for message in caplog.messages)


def test_a_model_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    one = model(None)
    held_out([one, one], None)
    assert len(caplog.messages) == 1


def test_how_documents_were_read_comes_along() -> None:
    assert held_out([model("90,10", True), model("90,10")], None).eod_mask_loss
    with pytest.raises(ConfigError, match="--split 'x'"):
        held_out([model("90,10")], "x")
