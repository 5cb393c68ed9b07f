"""--reset-attention-mask and --reset-position-ids: packed documents as if each were alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eslm.config.run import parse_run
from megatron_eslm.data.batch import Batch
from megatron_eslm.data.documents import DocumentRules
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import bare_gpt, load_weights
from megatron_eslm.model.hf.state import weight_sizes
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.mesh import build_mesh
from tests.harness import run_ranks

from .parity import Case
from .runs import ROWS, Outcome, assert_same_dumps, refusal, train, words

EOD = 44
SHAPES = {
    "gpt2": {},
    "llama": {"architecture": "llama", "num_query_groups": 2},
}


def shape_of(name: str) -> ModelShape:
    return ModelShape(
        num_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        ffn_hidden_size=56,
        max_position_embeddings=32,
        vocab_size=45,
        padded_vocab_size=45,
        **SHAPES[name],
    )


def hidden(shape: ModelShape, weights: dict, tokens_MT: torch.Tensor, rules: DocumentRules | None):
    """Final hidden states [M, T, D]."""
    model = bare_gpt(shape, build_mesh(), rules)
    load_weights(model, weights)
    tokens_MU = torch.cat([tokens_MT, tokens_MT[:, :1]], dim=1)
    with torch.no_grad():
        out, _ = model.run(Batch.of(tokens_MU, torch.ones_like(tokens_MT, dtype=torch.bool)))
    return model.final_norm(out).transpose(0, 1)


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_are_as_alone(process_group, name):
    shape = shape_of(name)
    torch.manual_seed(0)
    weights = {name: torch.randn(size) * 0.2 for name, size in weight_sizes(shape).items()}
    # Documents of 5, 1 and 20 tokens with their ends, and the beginning of one more.
    lengths = (5, 1, 20, 6)
    tokens_MT = torch.randint(0, EOD, (2, 32))
    tokens_MT[:, [4, 5, 25]] = EOD
    packed = hidden(shape, weights, tokens_MT, DocumentRules(EOD, True, True))
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone = hidden(shape, weights, tokens_MT[:, part], None)
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-4, atol=1e-5)
        begin += length
    assert begin == 32
    # Each flag alone differs from both together, and from neither.
    others = [
        hidden(shape, weights, tokens_MT, rules)
        for rules in (None, DocumentRules(EOD, True, False), DocumentRules(EOD, False, True))
    ]
    for other in others[1:]:
        assert (other - others[0])[:, 6:].abs().max() > 1e-3
    # Rotary positions are relative: inside a document, only the mask makes a difference.
    same = (others[1] - packed).abs().max() < 1e-4
    assert same == (name == "llama")


FLAGS = (
    *("--reset-attention-mask", "--reset-position-ids", "--seq-length", "96"),
    *("--num-layers", "4", "--global-batch-size", 2 * ROWS, "--eslm-alpha", "0.3"),
)
SCOPES = {"step": ("--eslm-scope", "step"), "micro": (), "dropout": ("--attention-dropout", "0.1")}
CASES = [
    Case(tp=2, zero=1, extra=("--sequence-parallel",)),
    Case(dp=2, zero=3),
    Case(pp=2, extra=("--activation-checkpoint-interval", "1")),
]


def run_scopes(data: list[str], folder: Path, case: Case, *more: str) -> dict[str, Outcome]:
    found = {}
    for name, scope in SCOPES.items():
        if case.pp > 1 and name != "step":
            continue  # a pipeline drops rows before the step
        place = folder / "_".join([*str(case).split(), name])
        flags = (*FLAGS, *scope, *case.flags, *more, "--dump-selection", place)
        argv = words(data, *flags, iters=2, micro_batch_size=ROWS // case.dp)
        found[name] = train(argv, place.with_suffix(".jsonl"))
    return found


def test_layouts_see_the_same_documents(data: list[str], tmp_path: Path) -> None:
    def on_one(rank: int) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
        whole = ("--no-reset-attention-mask", "--no-reset-position-ids")
        ours = run_scopes(data, tmp_path, Case())
        return ours, run_scopes(data, tmp_path / "whole", Case(), *whole)

    def on_two(rank: int) -> list[dict[str, Outcome]]:
        return [run_scopes(data, tmp_path, case) for case in CASES]

    (one, whole), many = run_ranks(1, on_one)[0], run_ranks(2, on_two, timeout=200)[0]
    assert abs(one["step"].column("loss")[-1] - whole["step"].column("loss")[-1]) > 1e-3
    for case, outcomes in zip(CASES, many, strict=True):
        for name, outcome in outcomes.items():
            np.testing.assert_allclose(
                outcome.column("loss"), one[name].column("loss"), atol=1e-5, err_msg=f"{case}"
            )
            np.testing.assert_allclose(
                outcome.valid_losses(), one[name].valid_losses(), atol=1e-5, err_msg=f"{case}"
            )
            places = ["_".join([*str(each).split(), name]) for each in (case, Case())]
            assert_same_dumps(*(tmp_path / place for place in places))


def test_a_run_continues_with_the_same_rules(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> str:
        train(words(data, "--reset-attention-mask", "--save", tmp_path / "run", iters=2))
        return refusal(words(data, "--load", tmp_path / "run"))

    assert "reset_attention_mask" in run_ranks(1, fn)[0]


def test_a_middle_stage_reads_no_documents():
    argv = ["--data-path", "x", "--model-size", "124M", "--reset-position-ids"]
    argv += ["--pipeline-model-parallel-size", "4"]
    with pytest.raises(ConfigError, match="--reset-position-ids with --pipeline-model-parallel"):
        parse_run(argv, 4)


def test_rules_of_two_rows():
    """The mask and positions of [a b E c | d] and [E E e f | g], written out."""
    tokens = torch.tensor([[1, 2, EOD, 3, 4], [EOD, EOD, 5, 6, 7]])
    documents = DocumentRules(EOD, True, True).of(tokens)
    assert documents.positions_TM.t().tolist() == [[0, 1, 2, 0], [0, 0, 0, 1]]
    assert documents.mask_M1TT.int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]],
        [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]],
    ]
    second = documents.rows(torch.tensor([1]))
    assert torch.equal(second.mask_M1TT[0], documents.mask_M1TT[1])
    assert second.positions_TM.t().tolist() == [[0, 0, 0, 1]]
    assert dataclasses.replace(DocumentRules(EOD)).of(tokens) == (None, None)
