"""The peers: transformers' GPT-2, and a plain one, each in a plain loop as people train one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch

from benchmarks.engines import BenchRun
from benchmarks.plain_gpt import PlainGPT

Masters = Literal["copies", "autocast", "none"]
"""Where a peer in bf16 keeps float32 weights: in copies that the optimizer steps, in the model
itself, with products in bf16 by autocast (nanoGPT's way), or nowhere."""


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


def plain_stepper(run: BenchRun, *, masters: Masters, compiled: bool) -> Callable[[], Any]:
    """A step of PlainGPT of a run's shape on its batches, with the same fused AdamW and clipping.

    Args:
        masters: only of bf16 runs.
        compiled: the whole model with its loss, by torch.compile.
    """
    dtype, device = run.run.dtype, run.device
    model = PlainGPT(run.shape).train().to(device)
    copies = autocast = False
    if dtype != torch.float32:
        copies, autocast = masters == "copies", masters == "autocast"
        model.to(torch.float32 if autocast else dtype)
    weights = list(model.parameters())
    stepped = [weight.detach().float() for weight in weights] if copies else weights
    groups = [
        {"params": [w for w in stepped if w.dim() > 1], "weight_decay": 0.1},
        {"params": [w for w in stepped if w.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)
    call = torch.compile(model) if compiled else model
    inputs = [batch.tokens_MU for batch in run.batches()]

    def step() -> None:
        for tokens in inputs:
            casts = torch.autocast(device.type, dtype) if autocast else contextlib.nullcontext()
            with casts:
                loss = call(tokens) / len(inputs)
            loss.backward()
        if copies:
            for copy, weight in zip(stepped, weights, strict=True):
                assert weight.grad is not None
                copy.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(stepped, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(weights, stepped)

    return step
