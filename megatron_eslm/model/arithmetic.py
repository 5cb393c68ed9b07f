"""Parameters and FLOPs of a GPT-2 block, embedding and head, in one place."""

from __future__ import annotations

from megatron_eslm.model.shape import ModelShape


def block_forward(shape: ModelShape, length: int) -> tuple[float, float]:
    """(linear layers, attention) of one block, forward, a token of a sequence of `length`."""
    linear = 2 * (4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.ffn_hidden_size)
    return linear, 4 * length * shape.hidden_size


def adapters_forward(shape: ModelShape, rank: int) -> float:
    """Adapters of one block (model/lora.py), forward, a token."""
    return 2.0 * rank * (8 * shape.hidden_size + 2 * shape.ffn_hidden_size)


def head_forward(shape: ModelShape) -> float:
    """Logits of one token."""
    return 2.0 * shape.hidden_size * shape.padded_vocab_size


def forward_flops(shape: ModelShape, *, positions: int, length: int, scored: int) -> float:
    """Matrix products of a forward pass.

    Args:
        shape: of the model.
        positions: that go through its blocks, in sequences of `length`.
        length: of the sequences.
        scored: positions whose logits are computed.
    """
    blocks = positions * shape.num_layers * sum(block_forward(shape, length))
    return blocks + scored * head_forward(shape)


def stage_params(
    shape: ModelShape, num_blocks: int, *, first: bool, last: bool, tp: int = 1
) -> int:
    """Parameters that one of `tp` tensor-parallel ranks of a stage holds.

    Columns, rows, heads and the vocabulary are divided by `tp`; norms, positions and the biases
    that are added after a reduction are held whole.
    """
    d, f = shape.hidden_size, shape.ffn_hidden_size
    block = (3 * d * d + 3 * d + d * d + d * f + f + f * d) // tp + 6 * d
    params = num_blocks * block
    if first or last:
        params += shape.padded_vocab_size * d // tp
    if first:
        params += shape.max_position_embeddings * d
    if last:
        params += 2 * d
    return params


def adapter_params(shape: ModelShape, num_blocks: int, rank: int, tp: int = 1) -> int:
    """Parameters of adapters (model/lora.py) that one of `tp` tensor-parallel ranks holds.

    Of each one factor is divided by `tp` as its layer is; the other is held whole.
    """
    d, f = shape.hidden_size, shape.ffn_hidden_size
    return num_blocks * rank * ((3 * d + d + f + f) // tp + (d + d + d + d))
