"""Metrics files for the tests of the reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_eslm.reports.runs import read_run


@pytest.fixture
def metrics_file(tmp_path: Path) -> Callable[..., Path]:
    """Write objects as JSON lines."""

    def write(name: str, *items: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    return write


def line(iteration: int, valid_loss: float | None = None, **more: Any) -> dict[str, Any]:
    """One metrics line."""
    return {"iteration": iteration, "loss": 5.0, "valid_loss": valid_loss, **more}


def totals(share: float, iteration: int, seconds: float) -> dict[str, Any]:
    """Running totals that grow with the iteration; `share` of the tokens is trained on."""
    return {
        "tokens": 1000 * iteration,
        "tokens_trained": int(1000 * share * iteration),
        "flops": 2e9 * share * iteration,
        "flops_paper": 3e9 * share * iteration,
        "elapsed_seconds": seconds * iteration,
        "step_seconds": seconds,
        "kept_instances": share,
        "kept_tokens": share,
        "nonfinite_steps": 0,
    }


@pytest.fixture
def make_run(metrics_file):
    """A run of two evaluations, at iterations 100 and 200."""

    def make(name: str, losses: tuple[float, float], share=1.0, seconds=0.5, by=None, **settings):
        lines = [
            line(i, loss, **totals(share, i, seconds))
            for i, loss in zip((100, 200), losses, strict=True)
        ]
        if by is not None:
            lines[-1]["valid_loss_by_domain"] = by
        head = {"run": {"seed": 1, "train_iters": 200, **settings}}
        return read_run(metrics_file(f"{name}.jsonl", head, *lines))

    return make


@pytest.fixture
def long_runs(metrics_file):
    """Two runs of many evaluations, the second for 0.8 of the costs."""
    return [
        read_run(
            metrics_file(
                f"{name}.jsonl",
                line(0, 9.0, flops=0, elapsed_seconds=0),
                *[
                    line(i, 3 + 9 / i, flops=cost * i * 1e13, elapsed_seconds=cost * i)
                    for i in range(5, 100, 5)
                ],
            )
        )
        for name, cost in (("a", 1.0), ("b", 0.8))
    ]
