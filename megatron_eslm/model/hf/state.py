"""Map between our state dict and that of a Hugging Face model, by the architecture's table.

Both directions use the same rows, so they cannot diverge.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.architectures.base import Weight
from megatron_eslm.model.architectures.registry import architecture_of
from megatron_eslm.model.shape import ModelShape


def num_weights(shape: ModelShape) -> int:
    """Number of tensors in our state dict."""
    return architecture_of(shape).num_weights(shape)


def weight_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> size of every tensor in our state dict."""
    return {weight.name: weight.size(shape) for weight in architecture_of(shape).weights(shape)}


def to_hf_state(weights: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Convert our state dict to names and layout of the Hugging Face model, float32.

    A tied head is omitted, and padding rows of the vocabulary are dropped. The input is not
    modified; tensors whose layout does not change share memory with it.

    Raises:
        ConfigError: tensors are missing, unknown or do not have the size that `shape` gives.
    """
    _check_names_and_sizes(weights, weight_sizes(shape), "The checkpoint", shape)
    return {
        name: tensor.contiguous()
        for weight in architecture_of(shape).weights(shape)
        for name, tensor in _exported(weight, weights[weight.name].float(), shape).items()
    }


def from_hf_state(state: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Convert a Hugging Face state dict without tied head to our float32 state dict, copied.

    Padding rows of the vocabulary are zero.

    Raises:
        ConfigError: tensors are missing, unknown or do not have the size that `shape` gives.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    for weight in architecture_of(shape).weights(shape):
        expected = torch.empty(weight.size(shape), device="meta")
        sizes |= {name: tuple(t.shape) for name, t in _exported(weight, expected, shape).items()}
    _check_names_and_sizes(state, sizes, "The Hugging Face model", shape)
    return {
        weight.name: weight.load(
            *(state[name].detach().float() for name in weight.hf), shape
        ).clone(memory_format=torch.contiguous_format)
        for weight in architecture_of(shape).weights(shape)
    }


def _exported(weight: Weight, tensor: Tensor, shape: ModelShape) -> dict[str, Tensor]:
    exported = weight.export(tensor, shape)
    parts = exported if isinstance(exported, tuple) else (exported,)
    return dict(zip(weight.hf, parts, strict=True))


def _check_names_and_sizes(
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, ...]],
    whose: str,
    shape: ModelShape,
) -> None:
    """Raise ConfigError unless `tensors` has exactly these names and sizes."""
    missing = sorted(sizes.keys() - tensors.keys())
    extra = sorted(tensors.keys() - sizes.keys())
    if missing or extra:
        faults = [f"lacks {_first(missing)}"] if missing else []
        faults += [f"holds the unknown {_first(extra)}"] if extra else []
        raise ConfigError(
            f"{whose} does not fit a {shape.architecture} model of its shape: it "
            f"{' and '.join(faults)}. It is damaged, or its settings belong to another model; use "
            "a complete one."
        )
    for name, size in sizes.items():
        if tuple(tensors[name].shape) != size:
            raise ConfigError(
                f"{whose}: {name} has size {tuple(tensors[name].shape)}, but its settings "
                f"ask for {size}. Its settings belong to another model; use a matching pair."
            )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
