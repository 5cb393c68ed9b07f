"""A GPT-2 in a few lines of plain torch, the strongest simple peer that we know.

Linear layers with their bias, torch's causal attention, F.cross_entropy over whole logits; nothing
that selection, parallel layouts or checkpoints would need. Its kind is nanoGPT's.

Shape legend: B rows, T positions, D hidden, H heads, V vocabulary. Activations are [B, T, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_eslm.model.shape import ModelShape


class PlainBlock(nn.Module):
    """[B, T, D] -> [B, T, D]: causal attention and MLP, each behind a norm, with residuals."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        hidden, wide = shape.hidden_size, shape.ffn_hidden_size
        self.num_heads = shape.num_attention_heads
        self.norm1, self.norm2 = (nn.LayerNorm(hidden, shape.layernorm_epsilon) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, wide), nn.Linear(wide, hidden)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.out(self._attention(self.norm1(x_BTD)))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD)), approximate="tanh"))

    def _attention(self, x_BTD: torch.Tensor) -> torch.Tensor:
        thirds = self.qkv(x_BTD).split(x_BTD.shape[-1], dim=-1)
        q, k, v = (third.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for third in thirds)
        mixed_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed_BHTK.transpose(1, 2).flatten(2)


class PlainGPT(nn.Module):
    """Calling it with tokens [B, T+1] returns the mean loss of their T labels."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.word = nn.Embedding(shape.padded_vocab_size, shape.hidden_size)
        self.position = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden_size, shape.layernorm_epsilon)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BU: torch.Tensor) -> torch.Tensor:
        positions_T = torch.arange(tokens_BU.shape[1] - 1, device=tokens_BU.device)
        x_BTD = self.word(tokens_BU[:, :-1]) + self.position(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.word.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BU[:, 1:].flatten())
