"""Algorithm 1, read independently and written for clarity: two passes, full logits, float64.

Nothing of the package is used. A GPT-2 is a dictionary of weights named as the package names them;
each sequence goes through it alone, so that equal sequences have equal scores to the last bit.
Selection sorts Python lists. Dropped rows and tokens are multiplied by zero.

Shape legend: M sequences, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Config:
    """What the reference has to know besides the weights."""

    num_layers: int
    num_heads: int
    vocab_size: int
    """Rows of the embedding beyond it are padding."""
    epsilon: float = 1e-5


@dataclass
class Outcome:
    """What one step selected and minimised."""

    kept_rows: list[int]
    kept_tokens: list[tuple[int, int]]
    """(row, position)."""
    instance_scores: list[float]
    token_scores: dict[tuple[int, int], float]
    loss: torch.Tensor
    gradients: Weights


def layer_norm(x: torch.Tensor, w: Weights, name: str, epsilon: float) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]


def attention(x_TD: torch.Tensor, w: Weights, name: str, num_heads: int) -> torch.Tensor:
    t, d = x_TD.shape
    channels = d // num_heads
    qkv = linear(x_TD, w, f"{name}.qkv")
    mixed = []
    for head in range(num_heads):  # rows of the projection: (head, {q, k, v}, channel)
        part = qkv[:, 3 * channels * head : 3 * channels * (head + 1)]
        q, k, v = part[:, :channels], part[:, channels : 2 * channels], part[:, 2 * channels :]
        scores_TT = q @ k.t() / math.sqrt(channels)
        future_TT = torch.ones(t, t).triu(1).bool()
        p_TT = scores_TT.masked_fill(future_TT, -math.inf).softmax(dim=1)
        mixed.append(p_TT @ v)
    return linear(torch.cat(mixed, dim=1), w, f"{name}.out")


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def logits_of(inputs_T: torch.Tensor, w: Weights, config: Config, num_layers: int) -> torch.Tensor:
    """[T, V] logits of one sequence after `num_layers` blocks, final norm and the tied head."""
    x = w["embedding.word.weight"][inputs_T] + w["embedding.position.weight"][: len(inputs_T)]
    for i in range(num_layers):
        block = f"blocks.{i}"
        normed = layer_norm(x, w, f"{block}.norm1", config.epsilon)
        x = x + attention(normed, w, f"{block}.attention", config.num_heads)
        normed = layer_norm(x, w, f"{block}.norm2", config.epsilon)
        x = x + linear(gelu(linear(normed, w, f"{block}.mlp.up")), w, f"{block}.mlp.down")
    x = layer_norm(x, w, "final_norm", config.epsilon)
    return x @ w["embedding.word.weight"][: config.vocab_size].t()


def losses_and_entropies(
    tokens_S: torch.Tensor, w: Weights, config: Config, num_layers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per position, in nats: (i) and (ii) of section 2."""
    p_TV = logits_of(tokens_S[:-1], w, config, num_layers).softmax(dim=1)
    losses, entropies = [], []
    for p_V, label in zip(p_TV, tokens_S[1:], strict=True):
        losses.append(-torch.log(p_V[label]))
        entropies.append(-(p_V * torch.log(p_V)).sum())
    return torch.stack(losses), torch.stack(entropies)


def riskiest(scores: dict, alpha: float) -> list:
    """Keys of the riskiest (1 - alpha) share, in key order; ties go to the lower key."""
    if not scores:
        return []
    k = max(1, math.floor((1 - alpha) * len(scores) + 1e-9))
    order = sorted(scores, key=lambda key: (-scores[key], key))
    return sorted(order[:k])


def algorithm1(
    weights: Weights,
    config: Config,
    tokens_MU: torch.Tensor,
    valid_MT: torch.Tensor,
    *,
    alpha: float,
    proxy_layers: int = 1,
    score: Literal["loss", "entropy"] = "loss",
    level: Literal["both", "instance", "token"] = "both",
    stride: int = 1,
    choose_tokens: Callable[[int, int], bool] | None = None,
) -> Outcome:
    """One step on a batch.

    Args:
        weights: by name, any type; computed with in float64.
        config: the rest of the model.
        tokens_MU: int64 [M, T+1].
        valid_MT: bool, whether label t of a row counts.
        alpha: share to drop.
        proxy_layers: L.
        score: risk of a token.
        level: at which levels to select.
        stride: score every stride-th position in line 4 (an estimate; 1 is the paper's).
        choose_tokens: instead of any selection, whether (row, position) is in the loss.
    """
    w = {name: x.detach().double().requires_grad_() for name, x in weights.items()}
    rows, positions = valid_MT.shape

    # Lines 4-6: the early exit, in inference mode.
    instance_scores: dict[int, float] = {}
    for row in range(rows):
        with torch.inference_mode():
            loss_T, entropy_T = losses_and_entropies(tokens_MU[row], w, config, proxy_layers)
        risk = (loss_T if score == "loss" else entropy_T).tolist()
        scored = [risk[t] for t in range(0, positions, stride) if valid_MT[row, t]]
        if scored:
            instance_scores[row] = sum(scored) / len(scored)
    select_rows = level != "token" and choose_tokens is None
    kept_rows = riskiest(instance_scores, alpha) if select_rows else list(range(rows))

    # Lines 7-9: the whole model on what is left.
    loss_of, token_scores = {}, {}
    for row in kept_rows:
        loss_T, entropy_T = losses_and_entropies(tokens_MU[row], w, config, config.num_layers)
        for t in range(positions):
            if valid_MT[row, t]:
                loss_of[row, t] = loss_T[t]
                risk_T = loss_T if score == "loss" else entropy_T
                token_scores[row, t] = risk_T[t].item()
    if choose_tokens is not None:
        kept_tokens = [key for key in sorted(loss_of) if choose_tokens(*key)]
    elif level == "instance":
        kept_tokens = sorted(loss_of)
    else:
        kept_tokens = riskiest(token_scores, alpha)

    # Lines 10-12.
    mask = {key: 1.0 if key in set(kept_tokens) else 0.0 for key in loss_of}
    loss = sum(mask[key] * loss_of[key] for key in loss_of) / max(1.0, sum(mask.values()))
    gradients = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    scores = [instance_scores.get(row, -math.inf) for row in range(rows)]
    return Outcome(kept_rows, kept_tokens, scores, token_scores, loss.detach(), gradients)
