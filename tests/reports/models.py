"""A small model over bytes in a checkpoint, for the tests of the reports."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_eslm.checkpoint.weights import write_weights
from megatron_eslm.data.tokenizers.build import ByteTokenizer, Tokenizer
from megatron_eslm.model.hf.folder import from_hf
from megatron_eslm.model.shape import ModelShape

POSITIONS = 24


def random_model(seed: int = 0, scale: float = 0.3) -> tuple[dict[str, torch.Tensor], ModelShape]:
    """Weights by name, every one at random."""
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=POSITIONS, vocab_size=257)
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    weights, shape = from_hf(model, config, 8)
    return dict(weights), shape


def save_model(
    folder: Path,
    *,
    seed: int = 0,
    scale: float = 0.3,
    iteration: int = 0,
    tokenizer: Tokenizer | None = ByteTokenizer(),  # noqa: B008
) -> tuple[dict[str, torch.Tensor], ModelShape]:
    """A random model as the checkpoint of an iteration under `folder`."""
    weights, shape = random_model(seed, scale)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        if tokenizer is not None:
            tokenizer.save(Path(aside) / "tokenizer")
        tokens = Path(aside) / "tokenizer" if tokenizer is not None else None
        run = str(Path(aside) / "run")
        written = write_weights(run, weights, shape, tokens, "test", iteration)
        folder.mkdir(exist_ok=True)
        written.rename(folder / written.name)
    return weights, shape
