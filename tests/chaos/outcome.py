"""What a run left behind, so that two runs can be compared to the last bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eslm.checkpoint.manifest import list_checkpoints
from megatron_eslm.checkpoint.weights import read_weights
from tests.chaos.table import Verdict
from tests.chaos.warm import Ended
from tests.training.runs import read_metrics

COLUMNS = (
    *("loss", "grad_norm", "tau_instance", "tau_token", "cvar", "alpha", "lr", "tokens"),
    *("tokens_trained", "kept_instances", "kept_tokens", "flops"),
)


@dataclass(frozen=True)
class Outcome:
    """Metrics by iteration, and the last checkpoint."""

    steps: dict[int, dict[str, Any]]
    valid_losses: dict[int, float]
    weights: str
    state: dict[str, Any]

    @classmethod
    def of(cls, metrics: Path, save: Path) -> Outcome:
        """Of a finished run."""
        lines = read_metrics(metrics)
        newest = list_checkpoints(save)[0]
        digest = hashlib.sha256()
        for name, tensor in sorted(read_weights(save).weights.items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        state = json.loads((newest / "state.json").read_text())
        del state["elapsed_seconds"], state["run_id"]
        return cls(
            {line["iteration"]: {c: line[c] for c in COLUMNS} for line in lines},
            {s["iteration"]: s["valid_loss"] for s in lines if s["valid_loss"] is not None},
            digest.hexdigest(),
            state,
        )

    def difference(self, other: Outcome) -> str | None:
        """The first thing in which two runs differ. Evaluations that a signal left out are none."""
        for iteration, step in self.steps.items():
            if other.steps.get(iteration) != step:
                return f"iteration {iteration}: {other.steps.get(iteration)} instead of {step}"
        if len(self.steps) != len(other.steps):
            return f"{len(other.steps)} iterations instead of {len(self.steps)}"
        for iteration, loss in other.valid_losses.items():
            if self.valid_losses.get(iteration) != loss:
                return f"validation loss {loss} at {iteration}"
        if self.weights != other.weights:
            return "the weights of the last checkpoint"
        if self.state != other.state:
            return f"state.json: {other.state} instead of {self.state}"
        return None


def judge(
    ended: Ended, expected: Outcome, metrics: Path, save: Path, since: int = 0
) -> tuple[Verdict, str]:
    """How a run took a fault.

    Args:
        ended: how it ended.
        expected: the uninterrupted run.
        metrics, save: what it wrote.
        since: iterations up to this one need not be in `metrics`.
    """
    if "Traceback" in ended.err:
        return Verdict.TRACEBACK, ended.err[-1500:]
    if ended.code == 2 and len(ended.errors) == 1:
        return Verdict.REFUSED, ended.errors[0]
    if ended.code != 0:
        return Verdict.LOST, f"exit code {ended.code}: {ended.err[-1500:]}"
    ours = Outcome.of(metrics, save)
    steps = {i: step for i, step in expected.steps.items() if i > since or i in ours.steps}
    wanted = Outcome(steps, expected.valid_losses, expected.weights, expected.state)
    difference = wanted.difference(ours)
    return (Verdict.SURVIVED, "") if difference is None else (Verdict.SILENT, difference)
