"""What changes during a run, all of it: this is what a checkpoint saves beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_eslm.selection.state import SelectionState


@dataclass
class TrainState:
    """Progress of a run. Mutable, in one place; options never change."""

    selection: SelectionState
    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences read: the data position."""
    tokens: int = 0
    """Valid tokens read."""
    tokens_trained: int = 0
    """Tokens that entered the loss."""
    flops: float = 0.0
    flops_paper: float = 0.0
    elapsed_seconds: float = 0.0
    """Training time, without evaluation and saving."""
    nonfinite_steps: int = 0
    """Steps that were skipped because scores or gradients were not finite."""
    nonfinite_in_a_row: int = 0
    best_valid_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for state.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of to_dict."""
        return cls(**{**values, "selection": SelectionState(**values["selection"])})
