"""Rows that are read on token by token give what reading them whole gives."""

from __future__ import annotations

import pytest
import torch

from megatron_eslm.config.run import parse_run
from megatron_eslm.data.batch import Batch
from megatron_eslm.model.decoding import Decoding
from megatron_eslm.model.gpt import GPT, bare_gpt
from megatron_eslm.parallel.mesh import build_mesh

LLAMA = ("--architecture", "llama", "--num-query-groups", "2")


def whole(model: GPT, row: list[int]) -> torch.Tensor:
    """Normalised hidden state of the last token, from the whole row alone."""
    tokens = torch.tensor([[*row, 0]])
    hidden, *_ = model.run(Batch.of(tokens, torch.ones_like(tokens[:, 1:], dtype=torch.bool)))
    return model.final_norm(hidden)[-1, 0]


@pytest.mark.parametrize("flags", [(), LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_decoding_equals_reading_whole_rows(process_group: None, flags: tuple[str, ...]) -> None:
    words = (
        "--data-path x --num-layers 3 --hidden-size 32 --num-attention-heads 4 --seq-length 24 "
        "--micro-batch-size 1 --train-iters 1 --lr 1"
    )
    model = bare_gpt(parse_run([*words.split(), *flags], 1).shape(97), build_mesh())
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(std=0.3, generator=generator)
    rows = [[5], [7, 8, 9, 10, 11, 12, 13], [1, 2, 3]]
    decoding = Decoding(model, rows, room=24)
    for new in range(12):
        if new == 6:
            decoding.keep([1, 2])  # the others do not notice
            rows = rows[1:]
        expected = torch.stack([whole(model, row) for row in rows])
        torch.testing.assert_close(decoding.last_MD, expected, atol=1e-5, rtol=1e-5)
        ids = [(new * 31 + len(row)) % 97 for row in rows]
        decoding.append(ids)
        rows = [[*row, id_] for row, id_ in zip(rows, ids, strict=True)]
