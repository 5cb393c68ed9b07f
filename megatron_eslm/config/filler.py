"""Fill in missing flags: from a checkpoint, DeepSpeed's JSON, the preset or a default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from megatron_eslm.config import deepspeed_json
from megatron_eslm.config.flags import flag_of
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.model_options import ModelOptions
from megatron_eslm.model.presets import PRESETS, Preset
from megatron_eslm.model.shape import ModelShape


class MissingFlags(ConfigError):
    """Required flags are not set and follow from nothing else."""


class Filler:
    """Fills missing flags: from the DeepSpeed JSON, then the preset, then a default."""

    def __init__(self, given: frozenset[str], json: dict[str, Any], preset: Preset | None) -> None:
        self.given, self.preset = given, preset
        self.json = deepspeed_json.values_from(json)

    def __call__(self, options: Any, name: str, default: Any = None) -> Any:
        """The value of a flag; None if it follows from nothing."""
        of_options = getattr(options, name)
        if name in self.given:
            return of_options
        others = (self.json.get(name), getattr(self.preset, name, None), of_options, default)
        return next((value for value in others if value is not None), None)

    def require(self, wanted: Iterable[tuple[Any, str]]) -> None:
        """Check that all of these flags have values.

        Args:
            wanted: options and the names of their fields.

        Raises:
            MissingFlags: some have none; the message names all of them.
        """
        missing = [flag_of(name) for options, name in wanted if self(options, name) is None]
        if not missing:
            return
        *others, last = missing
        names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
        it, follow = ("them", "follow") if others else ("it", "follows")
        brought = any(flag_of(field) in missing for field in SHAPE)
        raise MissingFlags(
            f"{names} not set and {follow} from nothing else. Give {it}, or --model-size "
            f"{'|'.join(PRESETS)}{', or --load a checkpoint of that shape' if brought else ''}."
        )


SHAPE = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "seq_length": "max_position_embeddings",
}
"""Flags of the model's shape that have no default -> their names in a checkpoint."""

_BLOCK = {
    "architecture": "architecture",
    "num_query_groups": "num_key_value_heads",
    "rotary_base": "rotary_base",
    "rotary_scaling": "rotary_scaling",
    "rotary_scaling_factor": "rotary_scaling_factor",
    "rotary_original_positions": "rotary_original_positions",
}
"""Flags of the block -> their names in a checkpoint."""


def with_shape(
    model: ModelOptions, stored: ModelShape, given: frozenset[str]
) -> tuple[ModelOptions, frozenset[str]]:
    """Fill missing model flags from a checkpoint; with --model-size, only those it does not set.

    Returns:
        (the flags, names of the flags taken from the checkpoint).
    """
    found: dict[str, Any] = {}
    if model.model_size is None:
        found = {name: getattr(stored, theirs) for name, theirs in (SHAPE | _BLOCK).items()}
        found["untie_embeddings_and_output_weights"] = not stored.tied_head
    found["ffn_hidden_size"] = stored.ffn_hidden_size
    found["layernorm_epsilon"] = stored.layernorm_epsilon
    found = {name: value for name, value in found.items() if name not in given}
    return dataclasses.replace(model, **found), frozenset(found)
