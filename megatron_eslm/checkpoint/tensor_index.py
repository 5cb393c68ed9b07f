"""tensors.json: index of a checkpoint's tensors and of the files that contain them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import pydantic

from megatron_eslm.checkpoint.manifest import TENSORS, Stamp, damaged
from megatron_eslm.checkpoint.shards import Shard
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.schema import STRICT, Count, Size, read_as
from megatron_eslm.model.hf.state import num_weights, weight_sizes
from megatron_eslm.model.lora import adapter_names, is_adapter
from megatron_eslm.model.model_options import Lora
from megatron_eslm.model.shape import ModelShape

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""Master weight and Adam's two moments."""


@dataclass(frozen=True)
class Piece:
    """Part of a parameter in one file: `begin` to `end` of the sharded dimension."""

    __pydantic_config__ = STRICT

    file: Annotated[str, pydantic.Field(pattern=r"^tensors_[0-9]{5,}\.safetensors$")]
    begin: Count
    end: Count


@dataclass(frozen=True)
class Stored:
    """Shape and pieces of one parameter."""

    __pydantic_config__ = STRICT

    shape: Annotated[tuple[Size, ...], pydantic.Field(min_length=1, max_length=2)]
    dim: Annotated[int, pydantic.Field(ge=0, le=1)] | None
    """Dimension along which the pieces are concatenated; None for a single full piece."""
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if self.axis >= len(self.shape) or (self.dim is None and len(self.pieces) != 1):
            raise ConfigError("dim does not fit the shape and the pieces")
        ends = [0, *(piece.end for piece in self.pieces)]
        begins = [*(piece.begin for piece in self.pieces), self.shape[self.axis]]
        if ends != begins or any(piece.begin >= piece.end for piece in self.pieces):
            raise ConfigError("pieces overlap or do not cover the parameter")

    @property
    def axis(self) -> int:
        """`dim`, or 0 if unsharded."""
        return self.dim or 0

    def piece_shape(self, piece: Piece) -> tuple[int, ...]:
        """Shape of the tensor that holds a piece."""
        shape = list(self.shape)
        shape[self.axis] = piece.end - piece.begin
        return tuple(shape)


@dataclass(frozen=True)
class LossScale:
    """State of fp16's dynamic loss scaler, with DeepSpeed's names."""

    __pydantic_config__ = STRICT

    cur_scale: Annotated[float, pydantic.Field(gt=0)]
    cur_iter: Count
    last_overflow_iter: Annotated[int, pydantic.Field(ge=-1, lt=2**63)]
    cur_hysteresis: Annotated[int, pydantic.Field(ge=-(2**31), lt=2**31)]


@dataclass(frozen=True)
class Scalars:
    """Optimizer state other than tensors."""

    adam_step: int = 0
    """Step count of Adam's bias correction."""
    loss_scale: LossScale | None = None


@dataclass(frozen=True, kw_only=True)
class TensorIndex(Stamp):
    """Contents of tensors.json."""

    __pydantic_config__ = STRICT

    adam_step: Count
    loss_scale: LossScale | None
    lora_scale: Annotated[float, pydantic.Field(gt=0)] | None
    """Factor on the products of adapters; None without adapters."""
    tensors: dict[str, Stored]
    """Parameters by name."""

    @property
    def scalars(self) -> Scalars:
        """Optimizer state other than tensors."""
        return Scalars(self.adam_step, self.loss_scale)

    @property
    def files(self) -> set[str]:
        """Names of the files that hold tensors."""
        return {piece.file for stored in self.tensors.values() for piece in stored.pieces}

    def tensors_of(self, file: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors in a file, by parameter name."""
        return {
            name: stored.piece_shape(piece)
            for name, stored in self.tensors.items()
            for piece in stored.pieces
            if piece.file == file
        }

    def has_moments(self, name: str) -> bool:
        """Whether a parameter is trained; with adapters (model/lora.py) all others are frozen."""
        return self.lora_scale is None or is_adapter(name)


def index_of(
    stamp: Stamp,
    shares: Iterable[tuple[str, dict[str, Shard]]],
    scalars: Scalars,
    lora_scale: float | None = None,
) -> TensorIndex:
    """Build the index from the shards that were written.

    Args:
        stamp: stamp of the checkpoint.
        shares: file names and the shards written to each.
        scalars: optimizer state other than tensors.
        lora_scale: factor on the products of adapters; None without adapters.
    """
    pieces: dict[str, list[Piece]] = {}
    shards: dict[str, Shard] = {}
    for file, share in shares:
        for name, shard in share.items():
            shards[name] = shard
            pieces.setdefault(name, []).append(Piece(file, shard.begin, shard.end))
    return TensorIndex(
        run_id=stamp.run_id,
        iteration=stamp.iteration,
        adam_step=scalars.adam_step,
        loss_scale=scalars.loss_scale,
        lora_scale=lora_scale,
        tensors={
            name: Stored(
                shard.full_shape, shard.dim, tuple(sorted(pieces[name], key=lambda p: p.begin))
            )
            for name, shard in sorted(shards.items())
        },
    )


def write_index(folder: Path, index: TensorIndex) -> None:
    """Write tensors.json; OSError if the disk fails."""
    (folder / TENSORS).write_text(json.dumps(asdict(index), indent=1) + "\n")


def read_index(folder: Path) -> TensorIndex:
    """Read tensors.json.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        return read_as(TensorIndex, folder / TENSORS)
    except FileNotFoundError:
        raise damaged(folder, f"{TENSORS} is missing") from None
    except ConfigError as error:
        raise damaged(folder, error) from error


def check_holds_model(
    folder: Path, index: TensorIndex, shape: ModelShape, lora: Lora | None
) -> None:
    """Raise ConfigError unless the index has exactly the parameters of a model of this shape.

    Args:
        folder: the checkpoint, for messages.
        index: index of the checkpoint.
        shape: model shape in run.json; untrusted, so nothing of that size is allocated.
        lora: adapters in run.json.
    """
    weights = {name: s.shape for name, s in index.tensors.items() if not is_adapter(name)}
    if len(weights) != num_weights(shape):  # before generating the names of 10 million layers
        raise damaged(
            folder,
            f"{TENSORS} lists {len(weights)} weights, but a model of {shape.num_layers} layers has "
            f"{num_weights(shape)}",
        )
    expected = weight_sizes(replace(shape, padded_vocab_size=shape.vocab_size))
    if lora is not None:
        expected |= _adapter_sizes(expected, lora.rank)
    if (lora and lora.scale) != index.lora_scale:
        raise damaged(folder, f"{TENSORS} has another adapter scale than the options of the run")
    there = {name: stored.shape for name, stored in index.tensors.items()}
    for name in sorted(expected.keys() | there.keys()):
        if expected.get(name) != there.get(name):
            raise damaged(
                folder,
                f"{TENSORS} has {name} as {there.get(name)}, but a model of its shape has it as "
                f"{expected.get(name)}",
            )


def _adapter_sizes(weights: dict[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters of all linear layers in the blocks."""
    sizes: dict[str, tuple[int, ...]] = {}
    for name, size in weights.items():
        if name.startswith("blocks.") and len(size) == 2:
            lora_a, lora_b = adapter_names(name)
            sizes |= {lora_a: (rank, size[1]), lora_b: (size[0], rank)}
    return sizes
