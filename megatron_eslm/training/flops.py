"""FLOPs ledgers: the matrix products that were executed, and the paper's accounting.

A product of [a, b] and [b, c] counts 2abc. Attention counts its full T x T square, as torch's
FlopCounterMode does, and its backward pass 2.5 times the forward one (the flash kernels compute the
scores again).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eslm.model.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step processed, over all data-parallel ranks."""

    tokens: int
    """Positions read (rows x T)."""
    tokens_deep: int
    """Positions that went through the blocks behind the selector (kept rows x T)."""
    tokens_scored: int
    """Positions whose logits the head computed."""
    tokens_trained: int
    """Tokens in the loss."""


@dataclass(frozen=True, kw_only=True)
class FlopsModel:
    """FLOPs of a step of one model and policy."""

    shape: ModelShape
    seq_length: int
    selector_depth: int
    """Blocks before the selector."""
    proxy: bool
    """Whether an early exit scores sequences with the head."""
    proxy_stride: int = 1
    logits_recomputed: bool = False
    blocks_recomputed: bool = False
    """Whether the backward pass computes the blocks' activations again."""

    def _block_forward(self) -> tuple[float, float]:
        """(linear layers, attention) of one block, a token."""
        s = self.shape
        linear = 2 * (4 * s.hidden_size**2 + 2 * s.hidden_size * s.ffn_hidden_size)
        return linear, 4 * self.seq_length * s.hidden_size

    def block(self, work: Work, number: int) -> float:
        """Matrix products of one block, forward and backward.

        Blocks before the selector run backward over all rows (with zero gradients for dropped
        ones), blocks behind it see kept rows only.
        """
        linear, attention = self._block_forward()
        again = 1 if self.blocks_recomputed else 0
        tokens = work.tokens if number < self.selector_depth else work.tokens_deep
        return tokens * ((3 + again) * linear + (3.5 + again) * attention)

    def scoring(self, work: Work) -> float:
        """Matrix products of the head as the early exit uses it: forward, on what is read."""
        return work.tokens * self._head_forward() / self.proxy_stride if self.proxy else 0.0

    def head(self, work: Work) -> float:
        """Matrix products of the final head; its backward pass sees kept tokens only."""
        backward = 3 if self.logits_recomputed else 2
        return self._head_forward() * (work.tokens_scored + backward * work.tokens_trained)

    def executed(self, work: Work) -> float:
        """Matrix products that ran, forward and backward. The embedding, a lookup, has none."""
        blocks = sum(self.block(work, number) for number in range(self.shape.num_layers))
        return self.scoring(work) + blocks + self.head(work)

    def _head_forward(self) -> float:
        """Logits of one token."""
        return 2.0 * self.shape.hidden_size * self.shape.padded_vocab_size

    def paper(self, work: Work) -> float:
        """Section 3, "FLOPs accounting", of the ESLM paper.

        6N + 12 L H Q T a token of the kept sequences; the proxy 2 N_proxy + 6 L' H Q T + 2 D V a
        token read; 4 D V + 32 D^2 + 8 D saved a masked token. N counts every parameter once,
        N_proxy embeddings, norms and the first L' blocks. The paper runs the proxy apart from the
        training pass, so its L' blocks count twice here as they do there.
        """
        s = self.shape
        d, v, hqt = s.hidden_size, s.padded_vocab_size, s.hidden_size * self.seq_length
        total = work.tokens_deep * (6.0 * s.num_params + 12 * s.num_layers * hqt)
        total -= (work.tokens_deep - work.tokens_trained) * (4.0 * d * v + 32 * d * d + 8 * d)
        if self.proxy:
            n_proxy = s.num_params_embedding + self.selector_depth * s.num_params_block + 2 * d
            total += work.tokens * (2.0 * n_proxy + 6 * self.selector_depth * hqt + 2 * d * v)
        return total


_DENSE_PEAK_TFLOPS = {
    # Vendors' dense bf16 figures, without sparsity.
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "V100": 125.0,
}


def device_peak_flops(device_name: str, override_tflops: float | None) -> float | None:
    """Dense half-precision peak in FLOP/s; None where it is not known (CPUs, float32 runs)."""
    if override_tflops is not None:
        return override_tflops * 1e12
    for name, tflops in _DENSE_PEAK_TFLOPS.items():
        if name in device_name:
            return tflops * 1e12
    return None
