"""Count parameters and FLOPs of a model, from its architecture's table of weights."""

from __future__ import annotations

from functools import cache

from megatron_eslm.model.architectures.base import OUTPUT, WORD_EMBEDDING, numel
from megatron_eslm.model.architectures.registry import architecture_of
from megatron_eslm.model.shape import ModelShape


@cache
def num_params(shape: ModelShape) -> int:
    """All parameters, a tied head counted once, padding of the vocabulary included."""
    return num_params_named(shape, "") + shape.num_layers * num_params_block(shape)


@cache
def num_params_block(shape: ModelShape, tp: int = 1) -> int:
    """Parameters of one block per tensor-parallel rank, biases and norms included."""
    return numel(architecture_of(shape).block, shape, tp)


def num_params_matmul(shape: ModelShape) -> int:
    """Parameters that multiply each token: all but learned positions and an untied embedding."""
    lookups = num_params_named(shape, "embedding.")
    if shape.tied_head:
        lookups -= num_params_named(shape, WORD_EMBEDDING)
    return num_params(shape) - lookups


@cache
def num_params_named(shape: ModelShape, prefix: str, tp: int = 1) -> int:
    """Parameters outside the blocks whose names start with `prefix`, per tensor-parallel rank."""
    ends = architecture_of(shape).ends(shape)
    return numel([w for w in ends if w.name.startswith(prefix)], shape, tp)


@cache
def linear_params(shape: ModelShape, prefix: str = "") -> int:
    """Weights of a block's linear layers whose names start with `prefix`."""
    linears = architecture_of(shape).linears(shape)
    return numel([w for w in linears if w.name.startswith(prefix)], shape)


@cache
def linear_widths(shape: ModelShape) -> int:
    """Inputs plus outputs of a block's linear layers, in sum."""
    return sum(sum(weight.size(shape)) for weight in architecture_of(shape).linears(shape))


def block_forward(shape: ModelShape, length: int) -> tuple[float, float]:
    """Forward FLOPs per token of one block: (linear layers, attention over `length` positions)."""
    return 2.0 * linear_params(shape), 4.0 * length * shape.hidden_size


def adapters_forward(shape: ModelShape, rank: int) -> float:
    """Forward FLOPs per token of one block's adapters (model/lora.py)."""
    return 2.0 * rank * linear_widths(shape)


def head_forward(shape: ModelShape) -> float:
    """Forward FLOPs of one token's logits."""
    return 2.0 * shape.hidden_size * shape.padded_vocab_size


def forward_flops(shape: ModelShape, *, positions: int, length: int, scored: int) -> float:
    """FLOPs of a forward pass (matmuls).

    Args:
        shape: the model's shape.
        positions: positions that pass through the blocks.
        length: positions per sequence.
        scored: positions whose logits are computed.
    """
    blocks = positions * shape.num_layers * sum(block_forward(shape, length))
    return blocks + scored * head_forward(shape)


def stage_params(
    shape: ModelShape, num_blocks: int, *, first: bool, last: bool, tp: int = 1
) -> int:
    """Parameters per tensor-parallel rank of a stage.

    A tied head makes the last stage hold the word embedding, too.
    """
    params = num_blocks * num_params_block(shape, tp)
    if first:
        params += num_params_named(shape, "embedding.", tp)
    if last:
        params += num_params_named(shape, "final_norm.", tp) + num_params_named(shape, OUTPUT, tp)
        if shape.tied_head and not first:
            params += num_params_named(shape, WORD_EMBEDDING, tp)
    return params


@cache
def adapter_params(shape: ModelShape, num_blocks: int, rank: int, tp: int = 1) -> int:
    """Parameters of adapters (model/lora.py) per tensor-parallel rank.

    The factor on the sharded side of a layer is sharded like it, the other is replicated.
    """
    total = 0
    for weight in architecture_of(shape).linears(shape):
        sizes = list(weight.size(shape))
        if weight.sharded is not None:
            sizes[weight.sharded] //= tp
        total += rank * sum(sizes)
    return num_blocks * total


@cache
def saved_widths(shape: ModelShape) -> tuple[int, int]:
    """Values per position that a block keeps for its backward pass: (residual, sharded).

    Residual: inputs and outputs of both norms. Sharded over tensor-parallel ranks: outputs of the
    column-parallel layers, inputs of the row-parallel ones, and rotated queries and keys.
    """
    architecture = architecture_of(shape)
    sharded = 0
    for weight in architecture.linears(shape):
        d_out, d_in = weight.size(shape)
        sharded += d_out if weight.sharded == 0 else d_in
    if architecture.rotary:
        sharded += (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    return 4 * shape.hidden_size, sharded
