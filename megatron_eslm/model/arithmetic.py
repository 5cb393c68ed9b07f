"""Count parameters and FLOPs of a GPT-2 block, embedding and head."""

from __future__ import annotations

from megatron_eslm.model.shape import ModelShape


def block_forward(shape: ModelShape, length: int) -> tuple[float, float]:
    """Forward FLOPs per token of one block: (linear layers, attention over `length` positions)."""
    linear = 2 * (4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.ffn_hidden_size)
    return linear, 4 * length * shape.hidden_size


def adapters_forward(shape: ModelShape, rank: int) -> float:
    """Forward FLOPs per token of one block's adapters (model/lora.py)."""
    return 2.0 * rank * (8 * shape.hidden_size + 2 * shape.ffn_hidden_size)


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

    Columns, rows, heads and the vocabulary are sharded over `tp` ranks; norms, positions and biases
    added after a reduction are replicated.
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
    """Parameters of adapters (model/lora.py) per tensor-parallel rank.

    One factor of each adapter is sharded like its layer, the other is replicated.
    """
    d, f = shape.hidden_size, shape.ffn_hidden_size
    return num_blocks * rank * ((3 * d + d + f + f) // tp + (d + d + d + d))
