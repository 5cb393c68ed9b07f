"""The peer: transformers' GPT-2 in a plain loop, as most people train one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engines import BenchRun


def peer_stepper(run: BenchRun) -> Callable[[], Any]:
    """A step of GPT2LMHeadModel of a run's shape, on the inputs of its batches.

    torch's scaled_dot_product_attention, the model's own loss, weights in the run's type, the same
    fused AdamW and clipping.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = run.shape
    config = GPT2Config(
        vocab_size=shape.padded_vocab_size,
        n_positions=shape.max_position_embeddings,
        n_embd=shape.hidden_size,
        n_layer=shape.num_layers,
        n_head=shape.num_attention_heads,
        n_inner=shape.ffn_hidden_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train().to(run.device, run.run.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    inputs = [batch.tokens_MU[:, :-1].contiguous() for batch in run.batches()]

    def step() -> None:
        for tokens in inputs:
            # Labels are shifted inside: it predicts one token a sequence less than we do.
            loss = model(input_ids=tokens, labels=tokens).loss / len(inputs)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
