"""Our GPT as a model of transformers, in memory and in a folder, and the way back.

Nothing here is believed untested: `compare_logits` runs both models on the same tokens, and the
tools publish a folder only after it agreed (`LOGIT_TOLERANCE`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.architectures.base import PADDED
from megatron_eslm.model.architectures.registry import architecture_of
from megatron_eslm.model.hf.state import to_hf_state
from megatron_eslm.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

LOGIT_TOLERANCE = 1e-4
"""Largest difference of any logit, float32, at which two models count as the same."""


def hf_config(shape: ModelShape, eod: int) -> PretrainedConfig:
    """The configuration of the transformers model of our shape; `eod` begins and ends a text."""
    _check_eod(eod, shape)
    return architecture_of(shape).hf.config(shape, eod)


def to_hf(weights: Mapping[str, Tensor], shape: ModelShape, eod: int) -> PreTrainedModel:
    """Our weights as a float32 transformers model (`GPT2LMHeadModel`, ...) in evaluation mode.

    Args:
        weights: our state dict, float32 (see `model.hf.state.weight_sizes`); not changed, but
            shared with the model where the layout is the same.
        shape: its shape; the vocabulary is cut back from its padding.
        eod: id of the end-of-document token.

    Raises:
        ConfigError: the weights do not fit the shape, or `eod` is outside the vocabulary.
    """
    import transformers
    from transformers.initialization import no_init_weights

    state = to_hf_state(weights, shape)
    if shape.tied_head:
        (words,) = (w.hf[0] for w in architecture_of(shape).ends(shape) if w.name in PADDED)
        state["lm_head.weight"] = state[words]
    model_class = getattr(transformers, architecture_of(shape).hf.model_class)
    with no_init_weights():  # no time for random weights that are replaced
        model = model_class(hf_config(shape, eod))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = _generation_config(eod)
    return model.eval()


def export(
    directory: str | Path,
    weights: Mapping[str, Tensor],
    shape: ModelShape,
    tokenizer: Any,
    *,
    with_tokenizer: bool = True,
) -> None:
    """Write a folder that `transformers.from_pretrained` loads.

    config.json, model.safetensors (float32), generation_config.json and the tokenizer's files
    (`export_tokenizer`). The same input gives the same bytes.

    Args:
        directory: created if missing; files of these names in it are replaced.
        weights, shape: as for `to_hf`.
        tokenizer: of `megatron_eslm.data.tokenizers.build`.
        with_tokenizer: else its files are left out.

    Raises:
        ConfigError: weights or tokenizer do not fit the shape, `transformers` reads text otherwise
            than the tokenizer, or the folder cannot be written.
    """
    from megatron_eslm.checkpoint.tensor_files import write_file
    from megatron_eslm.data.tokenizers.to_transformers import export_no_tokenizer, export_tokenizer

    directory = Path(directory)
    check_tokenizer(tokenizer, shape)
    state = to_hf_state(weights, shape)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # One file and no progress bar, unlike save_pretrained; the tied head is not stored twice.
        write_file(directory / "model.safetensors", state, metadata={"format": "pt"})
        hf_config(shape, tokenizer.eod).save_pretrained(directory)
        _generation_config(tokenizer.eod).save_pretrained(directory)
        if with_tokenizer:
            export_tokenizer(tokenizer, directory, shape.max_position_embeddings)
        else:
            export_no_tokenizer(directory)
    except OSError as error:
        raise ConfigError(
            f"The folder {directory} cannot be written: {error}. Choose another place or make room."
        ) from error


def compare_logits(
    weights: Mapping[str, Tensor],
    shape: ModelShape,
    hf_model: PreTrainedModel,
    prompts_ids: Sequence[Sequence[int]],
) -> float:
    """Largest absolute difference of any logit between our model and `hf_model`, float32.

    Args:
        weights, shape: our model.
        hf_model: float32; meant to come from `load_hf`, so that what is compared is the folder.
            Texts of different lengths share a batch; in a causal model what fills up the shorter
            ones changes nothing before it, and is compared as well.
        prompts_ids: token ids of each text, 1 to `max_position_embeddings` of them.

    Returns:
        The difference; infinity if any logit is not a finite number.
    """
    from megatron_eslm.launch.bootstrap import single_process
    from megatron_eslm.model.gpt import reference_logits

    worst = 0.0
    with single_process():
        for tokens_BT in _batches(prompts_ids):
            ours_BTV = reference_logits(dict(weights), shape, tokens_BT)
            with torch.no_grad():
                theirs_BTV = hf_model(tokens_BT.to(hf_model.device), use_cache=False).logits
            theirs_BTV = theirs_BTV[..., : shape.vocab_size]  # the rest is a folder's padding
            difference = (ours_BTV - theirs_BTV.to(ours_BTV)).abs().max().item()
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def _batches(prompts_ids: Sequence[Sequence[int]], longest: int = 128) -> Iterator[Tensor]:
    """int64 [B, T]: the short texts together, filled up with their last id; long ones alone."""
    short = [list(ids) for ids in prompts_ids if len(ids) <= longest]
    if short:
        width = max(map(len, short))
        yield torch.tensor([ids + ids[-1:] * (width - len(ids)) for ids in short])
    for ids in prompts_ids:
        if len(ids) > longest:
            yield torch.tensor([list(ids)])


def check_tokenizer(tokenizer: Any, shape: ModelShape) -> None:
    """Raise ConfigError if the tokenizer makes ids that the model has no embedding for."""
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model only "
            f"{shape.vocab_size}. It is not the tokenizer of this model; use the one it was "
            "trained with."
        )
    _check_eod(tokenizer.eod, shape)


def _check_eod(eod: int, shape: ModelShape) -> None:
    if not 0 <= eod < shape.vocab_size:
        raise ConfigError(
            f"The end-of-document id {eod} is outside the model's {shape.vocab_size} ids. The "
            "tokenizer is not the one of this model; use the one it was trained with."
        )


def _generation_config(eod: int) -> Any:
    from transformers import GenerationConfig

    # GPT-2 has no padding token; generate() wants one and never attends to it.
    return GenerationConfig(bos_token_id=eod, eos_token_id=eod, pad_token_id=eod)
