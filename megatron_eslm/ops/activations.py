"""Activations between the MLP's projections, with their derivatives.

`wide` is the output of the first projection: F columns for GELU; for SwiGLU 2 F, ordered (column,
{gate, up}).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Activation:
    """A function of the wide hidden states and its derivative."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    """[..., wide columns] -> [..., F]; differentiable."""
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(gradient [..., F], wide) -> gradient of wide."""


def _gelu(wide: torch.Tensor) -> torch.Tensor:
    return F.gelu(wide, approximate="tanh")


def _gelu_backward(grad: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(grad, wide, approximate="tanh")


def _halves(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return gate, up


def _swiglu_backward(grad: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    gate, up = _halves(wide)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.stack([grad_gate, grad * F.silu(gate)], dim=-1).flatten(-2)


class _SwiGLU(torch.autograd.Function):
    """Saves its input only; the plain form would also save silu(gate)."""

    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(wide)
        gate, up = _halves(wide)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (wide,) = ctx.saved_tensors
        return _swiglu_backward(grads[0], wide)


def _swiglu(wide: torch.Tensor) -> torch.Tensor:
    return _SwiGLU.apply(wide)


GELU = Activation(_gelu, _gelu_backward)
"""GELU in the tanh form."""
SWIGLU = Activation(_swiglu, _swiglu_backward)
"""silu(gate) * up (arXiv 2002.05202)."""
ACTIVATIONS = {"gelu": GELU, "swiglu": SWIGLU}
