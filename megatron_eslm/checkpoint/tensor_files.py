"""Tensors of a checkpoint on disk: one safetensors file per rank, and an index.

A file contains `weight/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>` in float32, where <name>
is a parameter's name in the full model. A file contains one shard of a tensor-parallel parameter;
the index (tensor_index.py) locates all pieces. A checkpoint can be read in any layout. With
adapters (model/lora.py), the weights are frozen and have no moments; readers get them with the
adapters merged, unless they ask for the separate tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_eslm.checkpoint.manifest import Stamp, check_stamp, damaged
from megatron_eslm.checkpoint.shards import Shard, whole
from megatron_eslm.checkpoint.tensor_index import KINDS, Scalars, TensorIndex, read_index
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.lora import adapter_names, is_adapter


def file_name(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"tensors_{rank:05d}.safetensors"


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor with nan or infinity; None if all are finite."""
    return next((name for name, tensor in tensors.items() if not _all_finite(tensor)), None)


def _all_finite(tensor: torch.Tensor) -> bool:
    # A sum is one pass over memory and finite only if all its terms are; large terms may overflow.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def write_file(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write CPU tensors as a safetensors file; OSError if the disk fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # wraps the disk's errors
        raise OSError(str(error)) from error
    path.chmod(mode)  # safetensors makes the file readable by its owner only


def metadata_of(stamp: Stamp) -> dict[str, str]:
    """Safetensors metadata that identifies the checkpoint."""
    return {"run_id": stamp.run_id, "iteration": str(stamp.iteration)}


@contextmanager
def _reading(folder: Path, file: str) -> Iterator[None]:
    """Turn an error in the block into a ConfigError that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise damaged(folder, f"{file} cannot be read: {error}") from error


def _open(folder: Path, file: str, index: TensorIndex) -> Any:
    """Open a safetensors file; ConfigError if it belongs to another checkpoint."""
    from safetensors import safe_open

    handle = safe_open(folder / file, framework="pt")
    metadata = handle.metadata() or {}
    text = metadata.get("iteration", "")
    iteration = int(text) if text.isdecimal() and len(text) < 20 else -1
    stamp = Stamp(run_id=metadata.get("run_id", ""), iteration=iteration)
    check_stamp(folder, file, stamp, index)
    return handle


def check_file(folder: Path, file: str, index: TensorIndex, *, moments: bool) -> None:
    """Compare a file's header with the index; no tensor is read.

    Args:
        folder: the checkpoint.
        file: name of the file.
        index: the checkpoint's tensors.json.
        moments: whether Adam's moments are expected.

    Raises:
        ConfigError: the file belongs to another checkpoint or has other tensors.
    """
    expected = {
        f"{kind}/{name}": list(shape)
        for name, shape in index.tensors_of(file).items()
        for kind in (KINDS if moments and index.has_moments(name) else KINDS[:1])
    }
    with _reading(folder, file):
        handle = _open(folder, file, index)
        there = set(handle.keys())
        if there != expected.keys():
            odd = min(there ^ expected.keys())
            what = "is missing" if odd in expected else "is unknown"
            raise damaged(folder, f"{odd} {what} in {file}")
        for name, shape in expected.items():
            _slice(folder, file, handle, name, shape)


def _slice(folder: Path, file: str, handle: Any, name: str, shape: list[int]) -> Any:
    """Open a tensor for partial reads; ConfigError unless it matches the index."""
    part = handle.get_slice(name)
    found, dtype = part.get_shape(), part.get_dtype()
    if (found, dtype) != (shape, "F32"):
        raise damaged(folder, f"{name} in {file} is {dtype} {found} but should be F32 {shape}")
    return part


class TensorReader:
    """Reads parts of parameters from the files that contain them.

    Args:
        folder: a checkpoint.
        merged: merge adapters into their weights; otherwise they are separate parameters, as in
            training.

    Raises:
        ConfigError: the index, or a file that it names, is damaged.
    """

    def __init__(self, folder: Path, *, merged: bool = True) -> None:
        self.folder = folder
        self._merged = merged
        self._index = read_index(folder)
        self._stored = self._index.tensors
        self._files: dict[str, Any] = {}

    @property
    def scalars(self) -> Scalars:
        """What the optimizer keeps beside tensors."""
        return self._index.scalars

    def check_holds(self, shards: dict[str, Shard]) -> None:
        """Raise ConfigError unless the checkpoint contains all these parameters."""
        missing = sorted(shards.keys() - self._names())
        if missing:
            raise ConfigError(
                f"{self.folder} does not contain {', '.join(missing[:3])} ({len(missing)} "
                "parameters in all) of this model. Start with the same model flags, or load "
                "another checkpoint."
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
        """Read elements `begin` to `end` of a flattened shard; reads only their rows from disk.

        Args:
            kind: one of KINDS.
            name: parameter name.
            shard: the shard to read; elements beyond the parameter (padding) are zero.
            begin: first element of the flattened shard.
            end: one past the last element; None is the end of the shard.

        Returns:
            float32 [end - begin].
        """
        end = shard.numel if end is None else end
        width = shard.numel // shard.shape[0]
        first, last = begin // width, -(-end // width)
        # Requested ranges in the dimensions of the full parameter.
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
                shape = list(stored.piece_shape(piece))
                with _reading(self.folder, piece.file):
                    handle = self._open(piece.file)
                    tensor = _slice(self.folder, piece.file, handle, f"{kind}/{name}", shape)
                    out.narrow(axis, start - low, stop - start).copy_(tensor[tuple(source)])
        if odd := not_finite({f"{kind}/{name}": out}):
            raise damaged(self.folder, f"{odd} has values that are not finite")
        if self._merged and self._is_adapted(name):
            assert kind == "weight"
            out += self._adapter(name, *(slice(*ends) for ends in wanted))
        return out.view(-1)[begin - first * width : end - first * width]

    def read_whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Read every full tensor of a kind, float32, by parameter name."""
        shapes = {name: self._stored[name].shape for name in sorted(self._names())}
        return {
            name: self.read(kind, name, whole(shape)).view(shape) for name, shape in shapes.items()
        }

    def _names(self) -> set[str]:
        """Names of the parameters that can be read."""
        return {name for name in self._stored if not (self._merged and is_adapter(name))}

    def _is_adapted(self, name: str) -> bool:
        return name.endswith(".weight") and adapter_names(name)[0] in self._stored

    def _adapter(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        """The adapter's contribution to these rows and columns of a weight."""
        lora_a, lora_b = (
            self.read("weight", part, whole(self._stored[part].shape)).view(
                self._stored[part].shape
            )
            for part in adapter_names(name)
        )
        assert self._index.lora_scale is not None
        return self._index.lora_scale * (lora_b[rows] @ lora_a[:, columns])

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = _open(self.folder, file, self._index)
        return self._files[file]
