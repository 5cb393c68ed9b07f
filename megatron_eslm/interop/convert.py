"""Checkpoint -> Hugging Face folder and back; each is published only after equal logits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from megatron_eslm.data.hub import TOKENIZER_FILES, model_folder
from megatron_eslm.data.tokenizers.from_transformers import folder_tokenizer
from megatron_eslm.errors import ConfigError, Failure
from megatron_eslm.interop import huggingface
from megatron_eslm.interop.prompts import prompts_ids
from megatron_eslm.interop.whole_folder import published
from megatron_eslm.model.hf.folder import from_hf, load_hf


class LogitMismatch(Failure):
    """The converted model does not compute what the original does: a bug, not a user's mistake."""

    def __init__(self, difference: float) -> None:
        super().__init__(
            f"the logits of the two models differ by {difference:.3g}, more than "
            f"{huggingface.LOGIT_TOLERANCE:g}; nothing was written."
        )
        self.difference = difference


def checkpoint_to_folder(
    load: str,
    output: str,
    tag: str | None = None,
    *,
    overwrite: bool = False,
    with_tokenizer: bool = True,
) -> float:
    """Export a checkpoint to a Hugging Face folder.

    Args:
        load: folder of checkpoints (`--load`).
        output: the folder to make (`--output`).
        tag: which checkpoint; default: the newest complete one.
        overwrite: replace an earlier export at `output`.
        with_tokenizer: export the tokenizer, too.

    Returns:
        Largest difference of any logit between the checkpoint and the exported folder.

    Raises:
        ConfigError: unusable checkpoint or output.
        LogitMismatch: the difference is above `LOGIT_TOLERANCE`.
    """
    from megatron_eslm.checkpoint.weights import read_weights

    with published(output, "--output", "config.json" if overwrite else None) as aside:
        source = read_weights(load, tag)
        tokenizer = checkpoint_tokenizer(source.tokenizer_dir, load)
        huggingface.export(
            aside, source.weights, source.shape, tokenizer, with_tokenizer=with_tokenizer
        )
        return _checked(source.weights, source.shape, aside, tokenizer)


def folder_to_checkpoint(source: str, save: str, multiple: int = 128) -> float:
    """Make a weights-only checkpoint, tokenizer included, from a Hugging Face folder.

    Args:
        source: the folder (`--input`), or the model's name on the Hugging Face hub.
        save: the folder of checkpoints to make (`--save`); an existing one is not touched.
        multiple: the vocabulary is padded to a multiple of this.

    Returns:
        Largest difference of any logit between the folder and the checkpoint read back.

    Raises:
        ConfigError: unusable folder, unsupported model, or `save` is taken.
        LogitMismatch: the difference is above `LOGIT_TOLERANCE`.
    """
    folder = _hub_or_local(source)
    model, tokenizer = load_hf(folder), folder_tokenizer(folder)
    weights, shape = from_hf(model, model.config, multiple, tokenizer.vocab_size)
    from megatron_eslm.checkpoint.weights import read_weights, write_weights

    with published(save, "--save") as aside, tempfile.TemporaryDirectory() as tokenizer_dir:
        tokenizer.save(tokenizer_dir)
        write_weights(str(aside), weights, shape, Path(tokenizer_dir), source=str(source))
        written = read_weights(str(aside))
        return _checked(written.weights, written.shape, folder, tokenizer)


def _hub_or_local(source: str) -> Path:
    """The folder of `--input`, fetched where it is a name on the hub."""
    safe = ("config.json", *TOKENIZER_FILES, "model*.safetensors", "model.safetensors.index.json")
    folder = model_folder("--input", source, safe)
    if folder != Path(source) and not any(folder.glob("*.safetensors")):
        older = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
        folder = model_folder("--input", source, (*safe, *older))
    return folder


def checkpoint_tokenizer(directory: Path | None, load: str) -> Any:
    """The tokenizer stored in a checkpoint; ConfigError if it holds none."""
    from megatron_eslm.data.tokenizers.build import load_tokenizer

    if directory is None:
        raise ConfigError(
            f"--load {load}: this checkpoint holds no tokenizer, so texts cannot be read or "
            "written with it. Use a checkpoint that was saved while training on prepared data."
        )
    return load_tokenizer(directory)


def _checked(weights: dict, shape: Any, folder: Path, tokenizer: Any) -> float:
    difference = huggingface.compare_logits(
        weights, shape, load_hf(folder), prompts_ids(tokenizer, shape)
    )
    if not difference <= huggingface.LOGIT_TOLERANCE:
        raise LogitMismatch(difference)
    return difference
