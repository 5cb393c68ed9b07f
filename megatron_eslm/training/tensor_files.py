"""Tensors of a checkpoint on disk: a safetensors file for each rank that wrote, and an index.

A file holds `weight/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>` in float32, where <name> is a
parameter's name in the whole model. Of a tensor-parallel parameter a file holds one shard; the
index says which files hold its pieces and where in it they lie. Nothing in either depends on the
layout that saved them. Beside adapters (model/lora.py) the weights are frozen and have no moments;
whoever reads such weights gets them with the adapters merged, unless they ask for the parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.lora import adapter_names, is_adapter
from megatron_eslm.training.parameter_shard import Shard, whole

INDEX = "tensors.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""Master weight and Adam's two moments."""


@dataclass(frozen=True)
class Piece:
    """Part of a parameter in one file: `begin` to `end` of the dimension that is cut."""

    file: str
    begin: int
    end: int


@dataclass(frozen=True)
class Stored:
    """One parameter."""

    shape: tuple[int, ...]
    dim: int | None
    """Dimension along which the pieces follow each other; None: one piece that is all of it."""
    pieces: tuple[Piece, ...]

    @property
    def axis(self) -> int:
        """`dim`, or 0 where nothing is cut."""
        return self.dim or 0

    @property
    def complete(self) -> bool:
        """Whether the pieces make up the parameter, without gap or overlap."""
        ends = [0, *(piece.end for piece in self.pieces)]
        begins = [*(piece.begin for piece in self.pieces), self.shape[self.axis]]
        return ends == begins


@dataclass(frozen=True)
class Scalars:
    """What the optimizer keeps beside tensors."""

    adam_step: int = 0
    """Steps that Adam's bias correction counts."""
    loss_scale: dict[str, float] | None = None
    """State of fp16's dynamic loss scaler (training/optimizer_state.py)."""


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"tensors_{rank:05d}.safetensors"


def write_file(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors on the CPU as safetensors; OSError where the disk does not take them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # it wraps the disk's own errors
        raise OSError(str(error)) from error
    path.chmod(mode)  # safetensors leaves a file that only its owner may read


def write_index(
    folder: Path,
    shares: Iterable[tuple[str, dict[str, Shard]]],
    scalars: Scalars,
    lora_scale: float | None = None,
) -> None:
    """Write the index of a folder.

    Args:
        folder: where the files are.
        shares: each file with the parts that were written to it.
        scalars: stored with it.
        lora_scale: what the products of adapters are multiplied by; None without adapters.
    """
    pieces: dict[str, list[Piece]] = {}
    shards: dict[str, Shard] = {}
    for file, share in shares:
        for name, shard in share.items():
            shards[name] = shard
            pieces.setdefault(name, []).append(Piece(file, shard.begin, shard.end))
    stored = {
        name: Stored(
            shard.full_shape, shard.dim, tuple(sorted(pieces[name], key=lambda piece: piece.begin))
        )
        for name, shard in sorted(shards.items())
    }
    for name, entry in stored.items():
        assert entry.complete, f"{name}: {entry} was written by other ranks than it should be"
    index = {
        **asdict(scalars),
        **({} if lora_scale is None else {"lora_scale": lora_scale}),
        "tensors": {name: asdict(entry) for name, entry in stored.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


class TensorReader:
    """Reads parts of parameters, from whichever files hold them.

    Args:
        folder: a checkpoint.
        merged: add adapters to the weights that they belong to; else they are parameters beside
            them, as in training.

    Raises:
        ConfigError: the index, or a file that it names, is not as it was written.
    """

    def __init__(self, folder: Path, *, merged: bool = True) -> None:
        self.folder = folder
        self._merged = merged
        self._files: dict[str, Any] = {}
        try:
            index = json.loads((folder / INDEX).read_text())
            self.scalars = Scalars(index["adam_step"], index["loss_scale"])
            self._stored = {
                name: Stored(
                    tuple(entry["shape"]),
                    entry["dim"],
                    tuple(Piece(**piece) for piece in entry["pieces"]),
                )
                for name, entry in index["tensors"].items()
            }
            self._lora_scale: float | None = (
                float(index["lora_scale"]) if any(map(is_adapter, self._stored)) else None
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder / INDEX} cannot be read: {error!r}.") from error
        for name, stored in self._stored.items():
            if not stored.complete:
                raise ConfigError(f"{folder} is damaged: {INDEX} lists only parts of {name}.")

    def check_holds(self, shards: dict[str, Shard]) -> None:
        """ConfigError unless these parts can be read from here."""
        missing = sorted(shards.keys() - self._names())
        if missing:
            raise ConfigError(
                f"{self.folder} does not hold {', '.join(missing[:3])} ({len(missing)} parameters "
                "in all) of this model. Start with the same model flags, or load another "
                "checkpoint."
            )
        for name, shard in shards.items():
            there = self._stored[name].shape
            if there != shard.full_shape:
                raise ConfigError(
                    f"{name} is {list(there)} in {self.folder} and {list(shard.full_shape)} in "
                    "this model. Start with the same model flags, or load another checkpoint."
                )

    def read(
        self, kind: str, name: str, shard: Shard, begin: int = 0, end: int | None = None
    ) -> torch.Tensor:
        """Elements `begin` to `end` of a flattened shard; no more than its rows is read from disk.

        Args:
            kind: one of KINDS.
            name: of the parameter.
            shard: the part of it that is meant; what lies beyond the parameter (padding) is zero.
            begin, end: of the flattened shard; None is its end.

        Returns:
            float32 [end - begin].
        """
        end = shard.numel if end is None else end
        width = shard.numel // shard.shape[0]
        first, last = begin // width, -(-end // width)
        # What is wanted, as ranges of the full parameter's dimensions.
        wanted = [(first, last), *((0, size) for size in shard.shape[1:])]
        low, high = wanted[shard.axis]
        wanted[shard.axis] = (low + shard.begin, high + shard.begin)
        out = torch.zeros([high - low for low, high in wanted])
        stored = self._stored[name]
        axis, (low, high) = stored.axis, wanted[stored.axis]
        for piece in stored.pieces:
            start, stop = max(piece.begin, low), min(piece.end, high)
            if start < stop:
                source = [slice(*ends) for ends in wanted]
                source[axis] = slice(start - piece.begin, stop - piece.begin)
                part = self._open(piece.file).get_slice(f"{kind}/{name}")[tuple(source)]
                out.narrow(axis, start - low, stop - start).copy_(part)
        if self._merged and self._is_adapted(name):
            assert kind == "weight"
            out += self._adapter(name, *(slice(*ends) for ends in wanted))
        return out.view(-1)[begin - first * width : end - first * width]

    def read_whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Every full tensor of a kind, float32, by parameter name."""
        shapes = {name: self._stored[name].shape for name in sorted(self._names())}
        return {
            name: self.read(kind, name, whole(shape)).view(shape) for name, shape in shapes.items()
        }

    def _names(self) -> set[str]:
        """Parameters that can be read."""
        return {name for name in self._stored if not (self._merged and is_adapter(name))}

    def _is_adapted(self, name: str) -> bool:
        return name.endswith(".weight") and adapter_names(name)[0] in self._stored

    def _adapter(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        """What its adapter adds to these rows and columns of a weight."""
        lora_a, lora_b = (
            self.read("weight", part, whole(self._stored[part].shape)).view(
                self._stored[part].shape
            )
            for part in adapter_names(name)
        )
        assert self._lora_scale is not None
        return self._lora_scale * (lora_b[rows] @ lora_a[:, columns])

    def _open(self, file: str) -> Any:
        if file not in self._files:
            from safetensors import SafetensorError, safe_open

            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{self.folder / file} cannot be read: {error}.") from error
        return self._files[file]
