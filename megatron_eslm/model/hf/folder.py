"""Load a Hugging Face model, from memory or a local folder, as our weights and shape.

Folders are not trusted: config.json is checked against a schema, and the sizes it claims against
the bytes of the weight files, before anything of these sizes is allocated.
"""

from __future__ import annotations

import json
import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_eslm.errors import ConfigError, first_line
from megatron_eslm.files.json_file import read_json
from megatron_eslm.files.regular import open_regular
from megatron_eslm.model.architectures.base import OUTPUT, WORD_EMBEDDING
from megatron_eslm.model.architectures.registry import (
    architecture_of,
    architecture_of_model_type,
)
from megatron_eslm.model.arithmetic import num_params
from megatron_eslm.model.hf.state import from_hf_state
from megatron_eslm.model.shape import ModelShape, pad_vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_MORE_JSON = (
    "generation_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""Files that transformers reads besides config.json."""
_LARGEST_MULTIPLE = 1 << 16


def hf_shape(config: Any, where: str = "The Hugging Face model's config") -> ModelShape:
    """Read a configuration as our shape, with every row of the embedding an id.

    Args:
        config: the content of a config.json, or a configuration object of transformers.
        where: the file, for messages.

    Raises:
        ConfigError: wrong types or sizes, or an architecture or value that is not supported.
    """
    if hasattr(config, "to_json_string"):
        config = json.loads(config.to_json_string(use_diff=False))
    if not isinstance(config, dict):
        raise ConfigError(f"{where} is not a JSON object. It is damaged; download it again.")
    architecture = architecture_of_model_type(config.get("model_type"))
    shape = architecture.hf.read_shape(config, where)
    architecture.check(shape)
    return shape


def with_vocabulary(shape: ModelShape, multiple: int, ids: int | None = None) -> ModelShape:
    """Replace the vocabulary of a shape by the tokenizer's, padded.

    Args:
        shape: from `hf_shape`.
        multiple: pad the vocabulary to a multiple of this.
        ids: number of ids of the tokenizer. Embedding rows beyond are padding, which many folders
            have, and not part of the vocabulary. Default: every row is an id.

    Raises:
        ConfigError: a bad multiple, or more ids than rows.
    """
    if not 1 <= multiple <= _LARGEST_MULTIPLE:
        raise ConfigError(
            f"--make-vocab-size-divisible-by {multiple} must be 1 to {_LARGEST_MULTIPLE}; 128 is "
            "usual."
        )
    rows = shape.vocab_size
    ids = rows if ids is None else ids
    if ids > rows:
        raise ConfigError(
            f"The tokenizer has {ids} ids, but the model only {rows} rows of embeddings "
            "(vocab_size in config.json). It is not the tokenizer of this model, or tokens were "
            "added to it and the model was not resized; use the pair that was trained."
        )
    return replace(shape, vocab_size=ids, padded_vocab_size=pad_vocab_size(ids, multiple))


def from_hf(
    model_or_state_dict: Any, config: Any, multiple: int, ids: int | None = None
) -> tuple[dict[str, Tensor], ModelShape]:
    """Convert a Hugging Face model to our state dict and shape.

    Args:
        model_or_state_dict: a causal language model of a supported architecture, its base model,
            or a state dict of either, in any floating-point dtype; not modified and not shared.
        config: the model's configuration.
        multiple: pad the vocabulary with zero rows to a multiple of this.
        ids: number of ids of the tokenizer, see `with_vocabulary`; rows beyond are dropped.

    Returns:
        float32 weights under our names, and the model's shape.

    Raises:
        ConfigError: an architecture, field or tensor is not supported, or there are more ids than
            rows.
    """
    theirs = hf_shape(config)
    shape = with_vocabulary(theirs, multiple, ids)
    if isinstance(model_or_state_dict, torch.nn.Module):
        model_or_state_dict = model_or_state_dict.state_dict()
    state = architecture_of(shape).hf.normalized(model_or_state_dict)
    if shape.tied_head:
        _drop_tied_head(state, shape)
    if padding := theirs.vocab_size - shape.vocab_size:
        for name in _padded_names(shape):
            if name in state and len(state[name]) == theirs.vocab_size:
                state[name] = state[name][: shape.vocab_size]
        logger.info(
            "the model has %d rows of embeddings and its tokenizer %d ids: the last %d rows are "
            "padding and are left out",
            theirs.vocab_size,
            shape.vocab_size,
            padding,
        )
    return from_hf_state(state, shape), shape


def read_hf_shape(directory: str | Path) -> ModelShape:
    """Read the shape of a local folder's model, without reading weights; see `hf_shape`.

    Raises:
        ConfigError: no such folder, another architecture, or weight files missing or too small for
            config.json.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise ConfigError(f"There is no folder {directory}; give one that contains a model.")
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{directory} is not a Hugging Face model: it has no config.json. Give a local folder "
            "with config.json, the weights and the tokenizer."
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{error} Download the model again.") from error
    shape = hf_shape(config, str(path))
    _check_sizes(directory, shape)
    return shape


def load_hf(directory: str | Path) -> PreTrainedModel:
    """Load a local folder (one file or shards) as a float32 transformers model in evaluation mode.

    Raises:
        ConfigError: no such folder, another architecture, missing or damaged files.
    """
    directory = Path(directory)
    shape = read_hf_shape(directory)
    for name in _MORE_JSON:
        if (directory / name).exists():
            read_json(directory / name)
    import transformers  # slow to import; only for valid folders

    model_class: Any = getattr(transformers, architecture_of(shape).hf.model_class)
    try:
        with _quiet_libraries():
            model, report = model_class.from_pretrained(
                directory,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # mismatches are listed in the report
            )
    except Exception as error:  # several libraries read files here, each with its own exceptions
        if _is_code(error):
            raise ConfigError(
                f"The Hugging Face model in {directory} cannot be loaded: pytorch_model.bin is "
                "damaged or contains more than tensors. Such a file could run code of its author, "
                "so it is refused. Get the weights as model.safetensors."
            ) from error
        raise ConfigError(
            f"The Hugging Face model in {directory} cannot be loaded: {first_line(error)}. "
            "Files are missing or damaged; download or export it again."
        ) from error
    # transformers initializes missing weights at random and only warns.
    faults = [f"lacks {name}" for name in sorted(report["missing_keys"])]
    faults += [
        f"has {name} of size {tuple(held)}, but config.json asks for {tuple(wanted)}"
        for name, held, wanted in sorted(report["mismatched_keys"])
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigError(
            f"The Hugging Face model in {directory} {faults[0]}{more}. Files are missing or belong "
            "to another model; download it again."
        )
    return model.eval()


def _check_sizes(directory: Path, shape: ModelShape) -> None:
    """Raise ConfigError unless the weight files are large enough for this shape."""
    files = [path for pattern in _WEIGHTS for path in sorted(directory.glob(pattern))]
    if not files:
        raise ConfigError(
            f"The Hugging Face model in {directory} cannot be loaded: it has neither "
            "model.safetensors nor pytorch_model.bin, as one file or in shards. Download the "
            "weights, too."
        )
    held = 0
    for file in files:
        with open_regular(file) as opened:
            held += opened.seek(0, 2)
    # All supported dtypes take at least one byte per number.
    if num_params(shape) > held:
        raise ConfigError(
            f"{directory / 'config.json'} describes a model of {num_params(shape)} parameters "
            f"({shape.num_layers} layers of width {shape.hidden_size}), but the weight files have "
            f"only {held} bytes. Files are missing or belong to another model; download it again."
        )


def _is_code(error: BaseException | None) -> bool:
    """Whether torch refused to unpickle an object that is not a tensor."""
    while error is not None:
        if isinstance(error, pickle.UnpicklingError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence progress bars, reports and warnings of the loading libraries, but not errors."""
    from transformers.utils import logging as hf_logging

    bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _padded_names(shape: ModelShape) -> list[str]:
    """Hugging Face names of the tensors with a row per id."""
    ends = architecture_of(shape).ends(shape)
    return [w.hf[0] for w in ends if w.name in (WORD_EMBEDDING, OUTPUT)]


def _drop_tied_head(state: dict[str, Tensor], shape: ModelShape) -> None:
    """Remove the head, which must equal the word embedding."""
    (name,) = _padded_names(shape)
    head, words = state.pop("lm_head.weight", None), state.get(name)
    if head is not None and words is not None and not torch.equal(head, words):
        raise ConfigError(
            f"The Hugging Face model has an untied head: lm_head.weight differs from {name}, "
            "although config.json has tie_word_embeddings. It is damaged or its config.json "
            "belongs to another model; use a matching pair."
        )
