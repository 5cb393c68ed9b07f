"""Model sizes of `--model-size` with their recipes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from megatron_eslm.model.architectures.names import ArchitectureName

ModelSize = Literal[
    "124M",
    "350M",
    "774M",
    "1.5B",
    "llama-125M",
    "llama-350M",
    "llama-1B",
    "llama-3B",
    "llama-8B",
]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model size with its recipe: defaults of flags under `--model-size`.

    Sources: Table 5 (shapes) and Table 4 (batch, learning rates, warm-up, decay, interval of
    ADA-ESLM) of the ESLM paper for GPT-2, and the last checkpoints that its Appendix D.4 names
    (40,000 steps, 30,000 for 350M and 774M; none for 1.5B, which gets 30,000, too).
    llama-1B, 3B and 8B have the shapes of Llama 3.2 1B and 3B and Llama 3.1 8B (their
    config.json), without context extension; 125M and 350M have the widths of GPT-2 and a key-value
    head per query head.
    Their recipe is that of the Llama papers (arXiv 2302.13971, 2407.21783): peak learning rates of
    3e-4, 6e-4 below 1B, a tenth at the end, 2000 steps of warm-up; batches of 0.5M tokens as in the
    paper, 2M from 1B on.
    """

    architecture: ArchitectureName = "gpt2"
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    ffn_hidden_size: int | None = None
    untie_embeddings_and_output_weights: bool = False
    rotary_base: float | None = None
    seq_length: int = 1024
    micro_batch_size: int
    gradient_accumulation_steps: int = 40
    lr: float
    min_lr: float = 6e-5
    lr_warmup_iters: int | None = 2000
    lr_decay_iters: int | None = 200_000
    train_iters: int | None = None
    eslm_adapt_interval: int | None = 1000


_llama = partial(Preset, architecture="llama", seq_length=2048, rotary_base=500_000.0)

PRESETS: dict[ModelSize, Preset] = {
    "124M": Preset(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        micro_batch_size=12,
        lr=6e-4,
        train_iters=40_000,
    ),
    "350M": Preset(
        num_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        micro_batch_size=8,
        lr=6e-4,
        train_iters=30_000,
    ),
    "774M": Preset(
        num_layers=36,
        hidden_size=1280,
        num_attention_heads=20,
        micro_batch_size=8,
        lr=1e-4,
        train_iters=30_000,
    ),
    "1.5B": Preset(
        num_layers=48,
        hidden_size=1600,
        num_attention_heads=25,
        micro_batch_size=4,
        lr=1e-4,
        train_iters=30_000,
    ),
    "llama-125M": _llama(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        ffn_hidden_size=2048,
        lr=6e-4,
        micro_batch_size=8,
        gradient_accumulation_steps=32,
    ),
    "llama-350M": _llama(
        num_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        ffn_hidden_size=2816,
        lr=6e-4,
        micro_batch_size=8,
        gradient_accumulation_steps=32,
    ),
    "llama-1B": _llama(
        num_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=8192,
        lr=3e-4,
        min_lr=3e-5,
        micro_batch_size=4,
        gradient_accumulation_steps=256,
    ),
    "llama-3B": _llama(
        num_layers=28,
        hidden_size=3072,
        num_attention_heads=24,
        num_query_groups=8,
        ffn_hidden_size=8192,
        lr=3e-4,
        min_lr=3e-5,
        micro_batch_size=2,
        gradient_accumulation_steps=512,
    ),
    "llama-8B": _llama(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        untie_embeddings_and_output_weights=True,
        lr=3e-4,
        min_lr=3e-5,
        micro_batch_size=1,
        gradient_accumulation_steps=1024,
    ),
}
