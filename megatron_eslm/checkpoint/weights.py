"""Read and write full weights, independent of the layout that saved them."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint import tensor_files, tensor_index
from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.manifest import Stamp, new_run_id
from megatron_eslm.checkpoint.publish import publish, write_json
from megatron_eslm.checkpoint.save_folder import SaveFolder, disk_errors
from megatron_eslm.checkpoint.shards import whole
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.architectures.base import PADDED
from megatron_eslm.model.shape import ModelShape


@dataclass(frozen=True)
class Weights:
    """Full weights on the CPU, with shape, tokenizer and origin."""

    weights: dict[str, torch.Tensor]
    """float32 by parameter name; padding rows of the vocabulary are zero, adapters are merged."""
    shape: ModelShape
    tokenizer_dir: Path | None
    iteration: int
    data: dict[str, Any] | None = None
    """Data record (`data_record`) of the run that saved them; None if unknown."""


def read_weights(load: str | Path, tag: str | None = None) -> Weights:
    """Read full float32 weights of a checkpoint of any kind and layout, with adapters merged.

    Raises:
        ConfigError: there is no complete checkpoint.
    """
    found = find_checkpoint(load, tag)
    shape = found.shape
    weights = tensor_files.TensorReader(found.folder).read_whole("weight")
    for name in weights.keys() & set(PADDED):
        rows = weights[name]
        padding = rows.new_zeros(shape.padded_vocab_size - shape.vocab_size, rows.shape[1])
        weights[name] = torch.cat([rows, padding])
    data = found.run.get("data") if found.kind == "training" else None
    return Weights(weights, shape, found.tokenizer_dir, found.manifest.iteration, data)


def write_weights(
    save: str | Path,
    weights: dict[str, torch.Tensor],
    shape: ModelShape,
    tokenizer_dir: Path | None,
    source: str,
    iteration: int = 0,
) -> Path:
    """Write a weights-only checkpoint, from which `--load` can start a run.

    Args:
        save: folder for the checkpoint; must not contain any yet.
        weights: float32 by parameter name; padding rows of the vocabulary are not written.
        shape: shape of the model.
        tokenizer_dir: tokenizer of the model, a folder written by `Tokenizer.save`.
        source: origin of the weights, for run.json.
        iteration: iteration in the checkpoint's name.

    Raises:
        ConfigError: the folder has checkpoints already or cannot be written, or the weights are
            not finite or do not match the shape.
    """
    stamp = Stamp(run_id=new_run_id(), iteration=iteration)
    cut = {name: weights[name][: shape.vocab_size] for name in weights.keys() & set(PADDED)}
    weights = {**weights, **cut}
    file = tensor_files.file_name(0)
    shards = {name: whole(tuple(tensor.shape)) for name, tensor in weights.items()}
    index = tensor_index.index_of(stamp, [(file, shards)], tensor_index.Scalars())
    tensor_index.check_holds_model(Path(source), index, shape, lora=None)
    tensors = {f"weight/{n}": t.contiguous() for n, t in weights.items()}
    if odd := tensor_files.not_finite(tensors):
        raise ConfigError(f"{source} is damaged: {odd} has values that are not finite.")
    folder = Path(save) / manifests.checkpoint_name(iteration)
    saves = SaveFolder(save)
    saves.take(load=None)
    try:
        with disk_errors(folder):
            draft = saves.begin(iteration)
            try:
                tensor_files.write_file(draft / file, tensors, tensor_files.metadata_of(stamp))
                tensor_index.write_index(draft, index)
                run = {**asdict(stamp), "source": source, "shape": shape.to_dict()}
                write_json(draft / manifests.RUN, run)
                if tokenizer_dir is not None:
                    shutil.copytree(tokenizer_dir, draft / manifests.TOKENIZER)
                files = {
                    name: manifests.describe(draft / name, sync=True)
                    for name in manifests.files_of(draft)
                }
                return publish(saves, draft, "weights", stamp, files)
            except BaseException:
                saves.discard(draft)
                raise
    finally:
        saves.release()
