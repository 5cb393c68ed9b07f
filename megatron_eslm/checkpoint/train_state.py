"""All mutable state of a run besides weights and optimizer, as saved in a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic

from megatron_eslm.checkpoint.manifest import RunId
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.schema import STRICT, Count, parse_as
from megatron_eslm.selection.state import SelectionState

_LATER = frozenset({"selection.mean_excess", "selection.overtaken_at"})
"""Fields that older checkpoints of the same format do not have; they begin with their default."""

Amount = Annotated[float, pydantic.Field(ge=0)]


@dataclass
class TrainState:
    """Progress of a run. The only mutable state; options never change."""

    __pydantic_config__ = STRICT

    selection: SelectionState
    run_id: RunId
    """ID of the run, kept whenever and wherever it is continued."""
    iteration: Count = 0
    """Optimizer steps done."""
    consumed_samples: Count = 0
    """Sequences consumed, which is the data position."""
    tokens: Count = 0
    """Valid tokens read."""
    tokens_trained: Count = 0
    """Tokens that entered the loss."""
    flops: Amount = 0.0
    flops_paper: Amount = 0.0
    elapsed_seconds: Amount = 0.0
    """Training time, without evaluation and saving."""
    nonfinite_steps: Count = 0
    """Steps that were skipped because scores or gradients were not finite."""
    nonfinite_in_a_row: Count = 0
    best_valid_loss: float | None = None
    """Lowest finite validation loss."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for state.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> TrainState:
        """Inverse of to_dict.

        Args:
            values: contents of state.json, not yet validated.
            where: the file, for messages.

        Raises:
            ConfigError: a value is missing, unknown, or of the wrong type.
        """
        state = parse_as(cls, values, where)
        # Defaults are for new runs; a stored state must have every field that its version had.
        for there, name in ((values, ""), (values["selection"], "selection.")):
            part = state.selection if name else state
            for field in dataclasses.fields(part):
                if field.name not in there and name + field.name not in _LATER:
                    raise ConfigError(
                        f"{where} has invalid contents: {name}{field.name} is missing."
                    )
        return state
