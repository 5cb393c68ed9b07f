"""A frozen GPT beside the trained model: a teacher or a reference model.

All its layers are on the last pipeline stage, where the labels are; a reference that scores
candidates is on each stage. It shares the trained model's tensor-parallel group and padded
vocabulary. It is not a submodule of the trained model, so neither the engine nor checkpoints
include it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from megatron_eslm.checkpoint.find import CheckpointInfo, find_checkpoint
from megatron_eslm.checkpoint.manifest import MANIFEST, list_checkpoints
from megatron_eslm.checkpoint.shards import Shard, shards_of
from megatron_eslm.checkpoint.tensor_files import TensorReader
from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.batch import Batch
from megatron_eslm.data.documents import DocumentRules
from megatron_eslm.data.tokenizers.build import Tokenizer, load_tokenizer, same_ids
from megatron_eslm.data.tokenizers.from_transformers import folder_tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.decoding import Decoding
from megatron_eslm.model.gpt import GPT, bare_gpt
from megatron_eslm.model.hf.folder import from_hf, load_hf, read_hf_shape, with_vocabulary
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.mesh import Mesh


@dataclass(frozen=True)
class FrozenSource:
    """Location and shape of a frozen model, known before anything is built."""

    folder: Path
    shape: ModelShape
    """Shape of the frozen model; `beside` gives it the trained model's vocabulary padding."""
    is_checkpoint: bool
    """A checkpoint of this system; otherwise a Hugging Face folder."""
    merged: bool = True
    """Merge adapters, if any, into the weights; if False, use the base weights."""

    @classmethod
    def of_checkpoint(cls, found: CheckpointInfo) -> FrozenSource:
        """Use the weights of a checkpoint."""
        return cls(found.folder, found.shape, True)

    def beside(self, shape: ModelShape) -> FrozenSource:
        """Copy with the vocabulary padding of the trained model's `shape`."""
        padded = dataclasses.replace(self.shape, padded_vocab_size=shape.padded_vocab_size)
        return dataclasses.replace(self, shape=padded)


class FrozenModel:
    """A full GPT in evaluation mode, sharded over the tensor-parallel ranks of one stage.

    Shape legend: T positions, M rows, E hidden, V rows of this rank's shard of the vocabulary.
    """

    def __init__(self, model: GPT) -> None:
        assert model.is_first and model.is_last
        self._model = model.eval().requires_grad_(False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's shards, with the names used in checkpoints."""
        return self._model.named_parameters()

    @property
    def weight_VE(self) -> torch.Tensor:
        """This rank's rows of the head."""
        return self._model.output_layer.weight

    @torch.no_grad()
    def hidden(self, tokens_MU: torch.Tensor) -> torch.Tensor:
        """Normalised hidden states [T, M, E], in the model's dtype, of tokens int64 [M, T+1]."""
        everything_MT = torch.ones_like(tokens_MU[:, 1:], dtype=torch.bool)
        hidden_TME, *_ = self._model.run(Batch.of(tokens_MU, everything_MT))
        return self._model.final_norm(hidden_TME)

    def decoding(self, rows: Sequence[Sequence[int]], room: int) -> Decoding:
        """Read rows of ids, to be continued up to a length of `room`."""
        return Decoding(self._model, rows, room)


def open_frozen(flag: str, folder: str, tag: str | None = None) -> tuple[FrozenSource, Tokenizer]:
    """Find a model and its tokenizer; does not read its weights.

    Args:
        flag: flag that names the folder, for messages.
        folder: a folder of checkpoints, one checkpoint (of any layout), or a Hugging Face model.
        tag: name of the checkpoint; None is the newest complete one.

    Raises:
        ConfigError: there is no complete model.
    """
    try:
        return _open(Path(folder), tag)
    except ConfigError as error:
        raise ConfigError(f"{flag} {folder}: {error}") from error


def find_frozen(
    flag: str, folder: str, tokenizer: Tokenizer, role: str, tag: str | None = None
) -> FrozenSource:
    """Find a frozen model whose tokenizer matches the data; does not read its weights.

    Args:
        flag: flag that names the folder, for messages.
        folder: a folder of checkpoints, one checkpoint (of any layout), or a Hugging Face model.
        tokenizer: tokenizer of the data.
        role: role of the model, for messages.
        tag: name of the checkpoint; None is the newest complete one.

    Raises:
        ConfigError: there is no complete model, or its token ids differ from those of the data.
    """
    what = f"{flag} {folder}"
    try:
        source, theirs = _open(Path(folder), tag)
    except ConfigError as error:
        raise ConfigError(f"{what} cannot be used as a {role}: {error}") from error
    if source.shape.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"{what} has a vocabulary of {source.shape.vocab_size}, but the data has one of "
            f"{tokenizer.vocab_size} ({tokenizer.name}). Use a {role} that was trained with the "
            f"tokenizer of the data, or preprocess the text with the tokenizer of this {role}."
        )
    if not same_ids(theirs, tokenizer):
        raise ConfigError(
            f"{what} was trained with another tokenizer ({theirs.name}) than that of the data "
            f"({tokenizer.name}): the same text has other ids. Use a {role} with the tokenizer of "
            f"the data, or preprocess the text with the tokenizer of this {role}."
        )
    return source


def check_fits(source: FrozenSource, run: RunConfig, what: str, otherwise: str) -> None:
    """Raise ConfigError unless a frozen model can run on the run's sequences and ranks.

    Args:
        source: the frozen model.
        run: gives sequence length and tensor-parallel size.
        what: flag and value that name the model, for messages.
        otherwise: an alternative remedy, which ends a sentence.
    """
    shape, tp = source.shape, run.engine.tensor_model_parallel_size
    if shape.max_position_embeddings < run.model.seq_length:
        raise ConfigError(
            f"{what} has {shape.max_position_embeddings} positions, fewer than --seq-length "
            f"{run.model.seq_length}. Lower --seq-length, or {otherwise}."
        )
    for things, number in (
        ("attention heads", shape.num_attention_heads),
        ("key-value heads", shape.num_key_value_heads),
        ("columns of the MLP", shape.ffn_hidden_size),
    ):
        if number % tp:
            raise ConfigError(
                f"{what} has {number} {things}, which --tensor-model-parallel-size {tp} does not "
                "divide, and it is spread over the same ranks as the model that trains. Change "
                f"that size, or {otherwise}."
            )


def load_frozen(
    source: FrozenSource,
    mesh: Mesh,
    dtype: torch.dtype,
    device: torch.device,
    documents: DocumentRules | None = None,
) -> FrozenModel:
    """Load a frozen model on this rank. Not collective.

    Args:
        source: from `find_frozen`.
        mesh: this rank's position in the mesh; the model is sharded over its tensor-parallel group.
        dtype: compute dtype.
        device: device of the model.
        documents: keep attention or positions inside documents.

    Raises:
        ConfigError: the model's files are damaged.
    """
    model = bare_gpt(source.shape, mesh, documents)
    shards = shards_of(model, mesh, source.shape.vocab_size)
    if source.is_checkpoint:
        reader = TensorReader(source.folder, merged=source.merged)
        reader.check_holds(shards)
        parts = {name: reader.read("weight", name, shard) for name, shard in shards.items()}
    else:
        theirs = load_hf(source.folder)
        weights, _ = from_hf(theirs, theirs.config, 1, source.shape.vocab_size)
        parts = {name: _cut(weights[name], shard) for name, shard in shards.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parts[name].view(parameter.shape))
    return FrozenModel(model.to(device=device, dtype=dtype))


def _open(folder: Path, tag: str | None) -> tuple[FrozenSource, Tokenizer]:
    """Open a model and its tokenizer, with the vocabulary padding found in its files."""
    if not folder.is_dir():
        raise ConfigError("there is no such folder.")
    if (folder / "config.json").is_file():
        if tag is not None:
            raise ConfigError(f"--tag {tag}: a Hugging Face folder has no tags.")
        tokenizer = folder_tokenizer(folder)
        shape = with_vocabulary(read_hf_shape(folder), 1, tokenizer.vocab_size)
        return FrozenSource(folder, shape, False), tokenizer
    if not (folder / MANIFEST).is_file() and not list_checkpoints(folder):
        raise ConfigError(
            "it contains neither checkpoints (folders such as iter_0000100) nor a Hugging Face "
            "model (config.json)."
        )
    found = find_checkpoint(folder, tag)
    if found.tokenizer_dir is None:
        raise ConfigError(
            f"{found.folder} holds no tokenizer, so the meaning of its ids is unknown. Use a "
            "checkpoint that was saved in training or written by tools/convert_from_hf.py."
        )
    return FrozenSource.of_checkpoint(found), load_tokenizer(found.tokenizer_dir)


def _cut(full: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Cut a shard out of a full parameter; padding beyond the parameter is zero."""
    part = full.narrow(shard.axis, shard.begin, shard.end - shard.begin)
    missing = shard.shape[shard.axis] - part.shape[shard.axis]
    pad = [0, 0] * (full.dim() - 1 - shard.axis) + [0, missing]
    return F.pad(part, pad)
