"""Map between our state dict and that of `GPT2LMHeadModel`.

Each row of the two tables below gives a tensor's names on both sides and how its layout differs.
Both directions use the same rows, so they cannot diverge.

Shape legend: D hidden size, F MLP width, H heads, K head width (D = H * K), P positions,
V vocabulary, VP padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.shape import ModelShape

Change = Callable[[Tensor, ModelShape], Tensor]


def _same(tensor: Tensor, shape: ModelShape) -> Tensor:
    return tensor


def _transpose(tensor: Tensor, shape: ModelShape) -> Tensor:
    """A linear layer [out, in] <-> transformers' Conv1D [in, out]; its own inverse."""
    return tensor.t()


def _cut_vocabulary(weight_VPD: Tensor, shape: ModelShape) -> Tensor:
    return weight_VPD[: shape.vocab_size]


def _pad_vocabulary(weight_VD: Tensor, shape: ModelShape) -> Tensor:
    rows = shape.padded_vocab_size - shape.vocab_size
    return torch.nn.functional.pad(weight_VD, (0, 0, 0, rows))


def _heads_to_thirds(rows: Tensor, shape: ModelShape) -> Tensor:
    """Reorder rows from (head, q|k|v, K), megatron-core's order, to (q|k|v, head, K)."""
    split = rows.reshape(shape.num_attention_heads, 3, shape.head_dim, *rows.shape[1:])
    return split.transpose(0, 1).reshape(rows.shape)


def _thirds_to_heads(rows: Tensor, shape: ModelShape) -> Tensor:
    """Reorder rows from (q|k|v, head, K) to (head, q|k|v, K)."""
    split = rows.reshape(3, shape.num_attention_heads, shape.head_dim, *rows.shape[1:])
    return split.transpose(0, 1).reshape(rows.shape)


def _qkv_out(weight: Tensor, shape: ModelShape) -> Tensor:
    return _heads_to_thirds(weight, shape).t()


def _qkv_in(weight: Tensor, shape: ModelShape) -> Tensor:
    return _thirds_to_heads(weight.t(), shape)


@dataclass(frozen=True)
class _Pair:
    ours: str
    theirs: str
    size: Callable[[ModelShape], tuple[int, ...]]
    """Size in our state dict."""
    export: Change = _same
    load: Change = _same


def _hidden(s: ModelShape) -> tuple[int, ...]:
    return (s.hidden_size,)


_OUTSIDE_BLOCKS = (
    _Pair(
        "embedding.word.weight",
        "transformer.wte.weight",
        lambda s: (s.padded_vocab_size, s.hidden_size),
        _cut_vocabulary,
        _pad_vocabulary,
    ),
    _Pair(
        "embedding.position.weight",
        "transformer.wpe.weight",
        lambda s: (s.max_position_embeddings, s.hidden_size),
    ),
    _Pair("final_norm.weight", "transformer.ln_f.weight", _hidden),
    _Pair("final_norm.bias", "transformer.ln_f.bias", _hidden),
)

_IN_A_BLOCK = (
    _Pair("norm1.weight", "ln_1.weight", _hidden),
    _Pair("norm1.bias", "ln_1.bias", _hidden),
    _Pair(
        "attention.qkv.weight",
        "attn.c_attn.weight",
        lambda s: (3 * s.hidden_size, s.hidden_size),
        _qkv_out,
        _qkv_in,
    ),
    _Pair(
        "attention.qkv.bias",
        "attn.c_attn.bias",
        lambda s: (3 * s.hidden_size,),
        _heads_to_thirds,
        _thirds_to_heads,
    ),
    _Pair(
        "attention.out.weight",
        "attn.c_proj.weight",
        lambda s: (s.hidden_size, s.hidden_size),
        _transpose,
        _transpose,
    ),
    _Pair("attention.out.bias", "attn.c_proj.bias", _hidden),
    _Pair("norm2.weight", "ln_2.weight", _hidden),
    _Pair("norm2.bias", "ln_2.bias", _hidden),
    _Pair(
        "mlp.up.weight",
        "mlp.c_fc.weight",
        lambda s: (s.ffn_hidden_size, s.hidden_size),
        _transpose,
        _transpose,
    ),
    _Pair("mlp.up.bias", "mlp.c_fc.bias", lambda s: (s.ffn_hidden_size,)),
    _Pair(
        "mlp.down.weight",
        "mlp.c_proj.weight",
        lambda s: (s.hidden_size, s.ffn_hidden_size),
        _transpose,
        _transpose,
    ),
    _Pair("mlp.down.bias", "mlp.c_proj.bias", _hidden),
)


def _pairs(shape: ModelShape) -> Iterator[_Pair]:
    """All parameters of a model of this shape, with full names on both sides."""
    yield from _OUTSIDE_BLOCKS
    for i in range(shape.num_layers):
        for pair in _IN_A_BLOCK:
            yield _Pair(
                f"blocks.{i}.{pair.ours}",
                f"transformer.h.{i}.{pair.theirs}",
                pair.size,
                pair.export,
                pair.load,
            )


def num_weights(shape: ModelShape) -> int:
    """Number of tensors in our state dict."""
    return len(_OUTSIDE_BLOCKS) + shape.num_layers * len(_IN_A_BLOCK)


def weight_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> size of every tensor in our state dict."""
    return {pair.ours: pair.size(shape) for pair in _pairs(shape)}


def to_gpt2_state(weights: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Convert our state dict to names and layout of `GPT2LMHeadModel`, float32.

    The tied head is omitted, and padding rows of the vocabulary are dropped. The input is not
    modified; tensors whose layout does not change share memory with it.

    Raises:
        ConfigError: tensors are missing, unknown or do not have the size that `shape` gives.
    """
    check_names_and_sizes(weights, weight_sizes(shape), "The checkpoint")
    return {
        pair.theirs: pair.export(weights[pair.ours].float(), shape).contiguous()
        for pair in _pairs(shape)
    }


def from_gpt2_state(state: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Convert `transformer.*` tensors without the head to our float32 state dict, copied.

    Padding rows of the vocabulary are zero.

    Raises:
        ConfigError: tensors are missing, unknown or do not have the size that `shape` gives.
    """
    sizes = {}
    for pair in _pairs(shape):
        expected = torch.empty(pair.size(shape), device="meta")
        sizes[pair.theirs] = tuple(pair.export(expected, shape).shape)
    check_names_and_sizes(state, sizes, "The Hugging Face model")
    return {
        pair.ours: pair.load(state[pair.theirs].detach().float(), shape).clone(
            memory_format=torch.contiguous_format
        )
        for pair in _pairs(shape)
    }


def check_names_and_sizes(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, ...]], whose: str
) -> None:
    """Raise ConfigError unless `tensors` has exactly these names and sizes."""
    missing = sorted(sizes.keys() - tensors.keys())
    extra = sorted(tensors.keys() - sizes.keys())
    if missing or extra:
        faults = [f"lacks {_first(missing)}"] if missing else []
        faults += [f"holds the unknown {_first(extra)}"] if extra else []
        raise ConfigError(
            f"{whose} does not fit a GPT-2 of its shape: it {' and '.join(faults)}. "
            "It is damaged, or its settings belong to another model; use a complete one."
        )
    for name, size in sizes.items():
        if tuple(tensors[name].shape) != size:
            raise ConfigError(
                f"{whose}: {name} has size {tuple(tensors[name].shape)}, but its settings "
                f"ask for {size}. Its settings belong to another model; use a matching pair."
            )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
