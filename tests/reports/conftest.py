"""Metrics files for the tests of the reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def metrics_file(tmp_path: Path) -> Callable[..., Path]:
    """Write objects as JSON lines."""

    def write(name: str, *items: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    return write


def line(iteration: int, valid_loss: float | None = None, **more: Any) -> dict[str, Any]:
    """One metrics line."""
    return {"iteration": iteration, "loss": 5.0, "valid_loss": valid_loss, **more}
