"""Load a Hugging Face GPT-2, from memory or a local folder, as our weights and shape.

Folders are not trusted: config.json is checked against a schema, and the sizes it claims against
the bytes of the weight files, before anything of these sizes is allocated.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_eslm.errors import ConfigError, first_line
from megatron_eslm.files.json_file import read_json
from megatron_eslm.files.regular import open_regular
from megatron_eslm.model.hf.gpt2_config import GPT2Fields, gpt2_shape, read_fields
from megatron_eslm.model.hf.gpt2_names import from_gpt2_state
from megatron_eslm.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

logger = logging.getLogger(__name__)

_WORDS = "transformer.wte.weight"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_MORE_JSON = (
    "generation_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""Files that transformers reads besides config.json."""


def from_gpt2(
    model_or_state_dict: Any, config: Any, multiple: int, ids: int | None = None
) -> tuple[dict[str, Tensor], ModelShape]:
    """Convert a Hugging Face GPT-2 to our state dict and shape.

    Args:
        model_or_state_dict: `GPT2LMHeadModel`, `GPT2Model` or a state dict of either, in any
            floating-point dtype; not modified and not shared.
        config: the model's GPT2Config.
        multiple: pad the vocabulary with zero rows to a multiple of this.
        ids: number of ids of the tokenizer, see `gpt2_shape`; rows beyond are dropped.

    Returns:
        float32 weights under our names, and the model's shape.

    Raises:
        ConfigError: an architecture, field or tensor is not supported, or there are more ids than
            rows.
    """
    fields = read_fields(config)
    shape = gpt2_shape(fields, multiple, ids)
    if isinstance(model_or_state_dict, torch.nn.Module):
        model_or_state_dict = model_or_state_dict.state_dict()
    state = _without_head(model_or_state_dict)
    padding = fields.vocab_size - shape.vocab_size
    if padding and _WORDS in state and len(state[_WORDS]) == fields.vocab_size:
        state[_WORDS] = state[_WORDS][: shape.vocab_size]
        logger.info(
            "the model has %d rows of embeddings and its tokenizer %d ids: the last %d rows are "
            "padding and are left out",
            fields.vocab_size,
            shape.vocab_size,
            padding,
        )
    return from_gpt2_state(state, shape), shape


def read_gpt2_config(directory: str | Path) -> GPT2Fields:
    """Read the configuration in a local folder, without reading weights.

    Raises:
        ConfigError: no such folder, another architecture, or weight files missing or too small for
            config.json.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise ConfigError(f"There is no folder {directory}; give one that contains a GPT-2.")
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{directory} is not a Hugging Face model: it has no config.json. Give a local folder "
            "with config.json, the weights and the tokenizer."
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{error} Download the model again.") from error
    fields = read_fields(config, str(path))
    _check_sizes(directory, gpt2_shape(fields, multiple=1))
    return fields


def load_gpt2(directory: str | Path) -> GPT2LMHeadModel:
    """Load a local folder (one file or shards) as a float32 `GPT2LMHeadModel` in evaluation mode.

    Raises:
        ConfigError: no such folder, another architecture, missing or damaged files.
    """
    directory = Path(directory)
    read_gpt2_config(directory)
    for name in _MORE_JSON:
        if (directory / name).exists():
            read_json(directory / name)
    from transformers import GPT2LMHeadModel  # slow to import; only for valid folders

    loader: Any = GPT2LMHeadModel.from_pretrained  # its types do not cover output_loading_info
    try:
        with _quiet_libraries():
            model, report = loader(
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
    if shape.num_params > held:
        raise ConfigError(
            f"{directory / 'config.json'} describes a model of {shape.num_params} parameters "
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


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Normalize names to `transformer.*`; check the tied head and drop it."""
    # GPT2Model and the first published GPT-2 files have no prefix; old files also carry the causal
    # masks as `attn.bias` and `attn.masked_bias`.
    named = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in state.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    head = named.pop("lm_head.weight", None)
    words = named.get(_WORDS)
    if head is not None and words is not None and not torch.equal(head, words):
        raise ConfigError(
            "The Hugging Face model has an untied head: lm_head.weight differs from "
            "transformer.wte.weight. Only tied heads are supported, so it cannot be converted; use "
            "a model with tie_word_embeddings."
        )
    return named
