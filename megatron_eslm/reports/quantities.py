"""What a run costs, and how these numbers are printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Format = Callable[[float], str]


def count(value: float) -> str:
    """Format a count."""
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """Format a time in seconds."""
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"


def flops(value: float) -> str:
    """Format a number of operations."""
    return f"{value:.3e}"


def loss(value: float) -> str:
    """Format a loss in nats."""
    return f"{value:.4f}"


@dataclass(frozen=True)
class Quantity:
    """A quantity that grows during training."""

    name: str
    """Field of the metrics line."""
    title: str
    form: Format


QUANTITIES = (
    Quantity("iteration", "iterations", count),
    Quantity("tokens_trained", "tokens trained on", count),
    Quantity("flops", "FLOPs executed", flops),
    Quantity("flops_paper", "FLOPs, paper's count", flops),
    Quantity("elapsed_seconds", "seconds", seconds),
)
