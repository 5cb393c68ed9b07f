"""Text from a trained model, by transformers' generate() with its key/value cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_eslm.data.tokenizers.base import clean_text
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import NOT_NEGATIVE, ONE_OR_MORE, Range, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOWEST_TEMPERATURE = 1e-6
"""Logits divided by less are beyond float32."""
_MOST_SAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt."""

    max_new_tokens: Annotated[int, ONE_OR_MORE] = 100
    """Stop after this many tokens, or at the end of the document."""

    temperature: Annotated[float, NOT_NEGATIVE] = 1.0
    """Divides the logits before sampling; 0 always takes the likeliest token."""

    top_k: Annotated[int, Range(at_least=0, why="0 takes all tokens")] = 0
    """Sample among this many likeliest tokens; 0 takes all."""

    top_p: Annotated[float, Range(above=0, at_most=1, why="1 takes all tokens")] = 1.0
    """Sample among the fewest tokens that together have this probability; 1 takes all."""

    num_samples: Annotated[
        int,
        Range(
            at_least=1, at_most=_MOST_SAMPLES, why="all are made at once; change --seed for more"
        ),
    ] = 1
    """Continuations of each prompt."""

    seed: Annotated[int, NOT_NEGATIVE] = 1234
    """Same seed, same text."""

    def __post_init__(self) -> None:
        check_fields(self)
        if 0 < self.temperature < _LOWEST_TEMPERATURE:
            raise ConfigError(
                f"--temperature {self.temperature:g} must be 0 (likeliest token) or a number from "
                f"{_LOWEST_TEMPERATURE:g} on; 1 samples as the model was trained."
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"--num-samples {self.num_samples} with --temperature 0 would give the same text "
                "each time; raise the temperature or ask for one sample."
            )


def open_model(load: str, tag: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a checkpoint of ours or of an exported Hugging Face folder.

    Raises:
        ConfigError: `load` is neither, or is damaged.
    """
    from megatron_eslm.data.tokenizers.from_transformers import folder_tokenizer
    from megatron_eslm.interop import convert, huggingface
    from megatron_eslm.model.hf.folder import hf_shape, load_hf, with_vocabulary

    if (Path(load) / "config.json").is_file():
        if tag is not None:
            raise ConfigError(f"--tag {tag}: {load} is a Hugging Face folder and has no tags.")
        model, tokenizer = load_hf(load), folder_tokenizer(load)
        with_vocabulary(hf_shape(model.config), 1, tokenizer.vocab_size)  # a row for every id
        return model, tokenizer

    from megatron_eslm.checkpoint.weights import read_weights

    source = read_weights(load, tag)
    tokenizer = convert.checkpoint_tokenizer(source.tokenizer_dir, load)
    huggingface.check_tokenizer(tokenizer, source.shape)
    return huggingface.to_hf(source.weights, source.shape, tokenizer.eod), tokenizer


def generate(model: PreTrainedModel, tokenizer: Any, prompt: str, sampling: Sampling) -> list[str]:
    """Prompt and continuation as text, once for each of `sampling.num_samples`.

    An empty prompt starts a new document.

    Raises:
        ConfigError: prompt and new tokens together exceed the model's positions.
    """
    prompt_ids = tokenizer.encode(clean_text(prompt))
    start = prompt_ids or [tokenizer.eod]
    _check_context(len(start), sampling.max_new_tokens, model.config.n_positions)
    return [
        tokenizer.decode(prompt_ids + new_ids)
        for new_ids in _continue(model, start, tokenizer, sampling)
    ]


def _check_context(prompt_tokens: int, new_tokens: int, context: int) -> None:
    if prompt_tokens + new_tokens <= context:
        return
    remedy = (
        f"ask for at most --max-new-tokens {context - prompt_tokens} or shorten the prompt"
        if prompt_tokens < context
        else "shorten the prompt"
    )
    raise ConfigError(
        f"The prompt has {prompt_tokens} tokens; with --max-new-tokens {new_tokens} that is more "
        f"than the {context} positions of this model; {remedy}."
    )


def _continue(model: Any, start: list[int], tokenizer: Any, sampling: Sampling) -> list[list[int]]:
    """New token ids of each sample, the end of document cut off."""
    import torch
    from transformers import GenerationConfig

    eod = tokenizer.eod
    # Embeddings beyond the tokenizer, as in folders whose vocabulary is padded, spell nothing.
    unspeakable = list(range(tokenizer.vocab_size, model.config.vocab_size))
    tokens_BT = torch.tensor([start], dtype=torch.int64, device=model.device)
    if sampling.temperature == 0:
        how: dict[str, Any] = {"do_sample": False}
    else:
        how = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.num_samples,
        bos_token_id=eod,
        eos_token_id=eod,
        pad_token_id=eod,
        suppress_tokens=unspeakable or None,
        use_cache=True,
        **how,
    )
    # generate() draws from torch's global generator; put it back for the caller.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        output_BT = model.generate(
            tokens_BT, attention_mask=torch.ones_like(tokens_BT), generation_config=config
        )
    return [_until(eod, row[len(start) :]) for row in output_BT.tolist()]


def _until(eod: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(eod)] if eod in ids else ids
