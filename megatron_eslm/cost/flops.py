"""FLOPs accounting: the matmuls executed, and the paper's formula.

A matmul of [a, b] and [b, c] counts 2abc. Attention counts its full T x T square, as torch's
FlopCounterMode does, and its backward pass 2.5 times the forward pass (flash kernels recompute the
scores).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_eslm.model.arithmetic import (
    adapters_forward,
    block_forward,
    forward_flops,
    head_forward,
    linear_params,
    linear_widths,
    num_params,
    num_params_block,
    num_params_matmul,
    num_params_named,
)
from megatron_eslm.model.shape import ModelShape, pad_vocab_size

PAPER_VOCAB_MULTIPLE = 128
"""The paper's vocabulary, 50,304, is GPT-2's 50,257 ids padded to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Positions processed by one step, over all data-parallel ranks."""

    tokens: int
    """Positions read (rows x T)."""
    tokens_deep: int
    """Positions that passed through the blocks after the selector (kept rows x T)."""
    tokens_scored: int
    """Positions whose logits the head computed."""
    tokens_trained: int
    """Tokens in the loss."""


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """Cost of a teacher."""

    shape: ModelShape
    runs: Callable[[], bool]
    """Whether the teacher runs in the current step (SALT stops after --salt-iters)."""


@dataclass(frozen=True, kw_only=True)
class FlopsModel:
    """FLOPs per step for one model and policy."""

    shape: ModelShape
    seq_length: int
    selector_depth: int
    """Blocks before the selector."""
    proxy: bool
    """Whether an early exit scores sequences with the head."""
    proxy_stride: int = 1
    ahead: bool = False
    """Whether sequences are selected before the step. The early exit's blocks then run one extra
    forward pass over everything read."""
    logits_recomputed: bool = False
    blocks_recomputed: bool = False
    """Whether the backward pass recomputes the blocks' activations."""
    alignment_rows: tuple[int, int] | None = None
    """Candidates and validation rows of GREATS' selection pass (training.gradient_alignment), which
    runs before each of a rank's micro-steps if it drops any."""

    teacher: TeacherCost | None = None
    reference: ModelShape | None = None
    """Shape of the reference model that runs during training, if any."""
    reference_scores: tuple[bool, bool] = (False, True)
    """Whether the reference model scores sequences, and tokens."""
    refers: Callable[[], bool] | None = None
    """Whether the reference model runs in the current step; not while alpha is 0. None: always."""
    last_mlp_kept: bool = False
    """Whether the backward pass of the last block's MLP is over the tokens in the loss only."""
    lora_rank: int = 0
    """Rank of adapters, if only adapters train: frozen layers compute no weight gradients."""

    def block(self, work: Work, number: int) -> float:
        """FLOPs of one block, forward and backward.

        Blocks before an in-model selector run backward over all rows (with zero gradients for
        dropped ones); blocks after it see kept rows only. If rows are selected before the step, all
        blocks see kept rows only. With adapters nothing before the first block's adapters trains,
        so no gradient of that block's input is computed.
        """
        linear, attention = block_forward(self.shape, self.seq_length)
        again = 1 if self.blocks_recomputed else 0
        before = number < self.selector_depth and not self.ahead
        tokens = work.tokens if before else work.tokens_deep
        products = (3 + again) * linear
        if self.lora_rank:
            products = (2 + again) * linear
            products += (3 + again) * adapters_forward(self.shape, self.lora_rank)
            if number == 0:
                qkv = linear_params(self.shape, "attention.qkv")
                products -= 2 * (qkv + self.lora_rank * self.shape.hidden_size)
        total = tokens * (products + (3.5 + again) * attention)
        if self.last_mlp_kept and number == self.shape.num_layers - 1:
            mlp = 2 * linear_params(self.shape, "mlp.")  # forward, per token
            total -= 2 * mlp * (work.tokens_deep - work.tokens_trained)
        return total

    def scoring(self, work: Work) -> float:
        """FLOPs of the early exit's scoring, forward only.

        Counts its head, and its blocks if they run for scoring alone.
        """
        if not self._scores(work):
            return 0.0
        head = head_forward(self.shape) / self.proxy_stride
        block = sum(block_forward(self.shape, self.seq_length))
        if self.lora_rank:
            block += adapters_forward(self.shape, self.lora_rank)
        blocks = self.selector_depth * block
        own = work.tokens * (head + (blocks if self.ahead else 0.0))
        return own + self._reference_forward(self._reference_tokens(work)[0])

    def _scores(self, work: Work) -> bool:
        """Whether the early exit runs: not in steps that drop no sequence."""
        return self.proxy and work.tokens_deep < work.tokens

    def head(self, work: Work) -> float:
        """FLOPs of the final head, with backward over kept tokens only, and of frozen models."""
        products = 3 if self.logits_recomputed else 2
        if self._is_taught and self.logits_recomputed:
            products += 1  # the divergence recomputes the logits in the forward pass, too
        if self.lora_rank:
            products -= 1  # a frozen head has no gradient
        own = head_forward(self.shape) * (work.tokens_scored + products * work.tokens_trained)
        return own + self.teaching(work) + self._reference_forward(self._reference_tokens(work)[1])

    def teaching(self, work: Work) -> float:
        """FLOPs of the teacher: forward over kept sequences, and logits of tokens in the loss.

        The logits count twice, since the backward pass recomputes them.
        """
        if not self._is_taught:
            return 0.0
        assert self.teacher is not None
        return forward_flops(
            self.teacher.shape,
            positions=work.tokens_deep,
            length=self.seq_length,
            scored=2 * work.tokens_trained,
        )

    def _reference_tokens(self, work: Work) -> tuple[int, int]:
        """Tokens that the reference model reads for the scores of sequences, and of tokens.

        It scores all labels of what it reads. In-model selection of sequences has scored the tokens
        of its micro-batch, too.
        """
        if not self._refers:
            return 0, 0
        of_sequences, of_tokens = self.reference_scores
        candidates = work.tokens if of_sequences and self._scores(work) else 0
        again = of_tokens and (self.ahead or not candidates)
        return candidates, work.tokens_deep if again else 0

    def _reference_forward(self, tokens: int) -> float:
        if not tokens:
            return 0.0
        assert self.reference is not None
        return forward_flops(
            self.reference, positions=tokens, length=self.seq_length, scored=tokens
        )

    @property
    def _refers(self) -> bool:
        return self.reference is not None and (self.refers is None or self.refers())

    @property
    def _is_taught(self) -> bool:
        return self.teacher is not None and self.teacher.runs()

    def alignment(self, work: Work) -> float:
        """FLOPs of GREATS' selection pass.

        Counts a forward pass and an activation-only backward pass over candidates and validation
        rows, the weight gradient of the linear layers over validation rows and its product with the
        candidates, and the products between positions for each pair of candidates.
        """
        if not self._aligns(work):
            return 0.0
        assert self.alignment_rows is not None
        linear, attention = block_forward(self.shape, self.seq_length)
        head = head_forward(self.shape)
        weights = self.shape.num_layers * linear + head  # forward, a token
        tokens = self.seq_length * sum(self.alignment_rows)
        layers = 2 * self.shape.num_layers * linear + 3.5 * self.shape.num_layers * attention
        passes = tokens * (layers + 2 * head + weights)
        return self._num_alignments(work) * (passes + self._pairs(self.shape))

    def _aligns(self, work: Work) -> bool:
        # If the keep rule keeps every row, the pass is skipped.
        return self.alignment_rows is not None and work.tokens_deep < work.tokens

    def _num_alignments(self, work: Work) -> float:
        assert self.alignment_rows is not None
        return work.tokens / (self.seq_length * self.alignment_rows[0])

    def _pairs(self, shape: ModelShape) -> float:
        """FLOPs of products between positions, over all pairs of candidates of a micro-step."""
        assert self.alignment_rows is not None
        s, candidates = shape, self.alignment_rows[0]
        blocks = s.num_layers * linear_widths(s)
        # Lookup and head: four similarities of hidden states, one of logits.
        embedding = 4 * s.hidden_size + s.padded_vocab_size
        pairs = candidates * (candidates + 1) / 2
        return pairs * 2 * self.seq_length**2 * (blocks + embedding)

    def executed(self, work: Work) -> float:
        """FLOPs of all executed matmuls, forward and backward. The embedding is a lookup: none."""
        blocks = sum(self.block(work, number) for number in range(self.shape.num_layers))
        return self.scoring(work) + blocks + self.head(work) + self.alignment(work)

    def model_flops(self, work: Work) -> float:
        """FLOPs of the model alone, for MFU as others report it: 6 N + 12 L H Q T per token.

        Source: PaLM (Chowdhery et al. 2022), appendix B, over the tokens of the sequences that are
        trained on, without scoring, recomputation or savings of the head. N leaves out positions
        and an embedding that is not the head.
        """
        s = self.shape
        n = num_params_matmul(s)
        attention = 12 * s.num_layers * s.hidden_size * self.seq_length
        return work.tokens_deep * (6.0 * n + attention)

    def paper_flops(self, work: Work) -> float:
        """Section 3, "FLOPs accounting", of the ESLM paper.

        6N + 12 L H Q T per token of kept sequences; for the proxy 2 N_proxy + 6 L' H Q T + 2 D V
        per token read; minus 4 D V + 32 D^2 + 8 D per masked token. N counts every parameter once,
        N_proxy embeddings, norms and the first L' blocks; 32 D^2 is 4 x the weights of GPT-2's
        MLP, and counted as such for other blocks. V is the vocabulary in the paper's padding, a
        multiple of 128, whatever rows the embedding has on this layout. The paper runs the proxy
        separately from the training pass, so its L' blocks count twice, here as there. Its
        formulas do not cover teachers: one counts as its forward pass over kept sequences, and so
        does Rho-1's reference model (Appendix D.4) over what it reads, by the proxy's rule,
        2 N + 6 L H Q T per token. Adapters are not covered either and change nothing here.
        """
        s = _as_the_paper_pads(self.shape)
        d, v, hqt = s.hidden_size, s.padded_vocab_size, s.hidden_size * self.seq_length
        mlp = linear_params(s, "mlp.")
        n = num_params(s)
        total = work.tokens_deep * (6.0 * n + 12 * s.num_layers * hqt)
        total -= (work.tokens_deep - work.tokens_trained) * (4.0 * d * v + 4 * mlp + 8 * d)
        if self._scores(work):
            n_proxy = num_params_named(s, "embedding.") + num_params_named(s, "final_norm.")
            n_proxy += self.selector_depth * num_params_block(s)
            total += work.tokens * (2.0 * n_proxy + 6 * self.selector_depth * hqt + 2 * d * v)
        if self._aligns(work):
            # Appendix D.4: forward on candidates and validation rows, backward to activations, and
            # ghost products.
            assert self.alignment_rows is not None
            tokens = self.seq_length * sum(self.alignment_rows)
            one = tokens * (4.0 * n + 12 * s.num_layers * hqt) + self._pairs(s)
            total += self._num_alignments(work) * one
        if self._is_taught:
            assert self.teacher is not None
            total += work.tokens_deep * self._paper_forward(self.teacher.shape)
        if self._refers:
            assert self.reference is not None
            total += sum(self._reference_tokens(work)) * self._paper_forward(self.reference)
        return total

    def _paper_forward(self, shape: ModelShape) -> float:
        """The paper's count of a forward pass of a whole model, per token."""
        attention = 6.0 * shape.num_layers * shape.hidden_size * self.seq_length
        return 2.0 * num_params(_as_the_paper_pads(shape)) + attention


def _as_the_paper_pads(shape: ModelShape) -> ModelShape:
    """The shape with its vocabulary padded as on one rank: 50,257 to 50,304."""
    padded = pad_vocab_size(shape.vocab_size, PAPER_VOCAB_MULTIPLE)
    return dataclasses.replace(shape, padded_vocab_size=padded)


_DENSE_PEAK_TFLOPS = (
    # Vendors' dense bf16 figures, without sparsity; the first pattern that is found counts.
    (r"MIG ", None),  # a slice of a device
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.5),
    (r"H200 NVL", 835.5),
    (r"GH200|H200|H100|H800", 989.0),
    (r"\bH20\b", 148.0),
    (r"A100|A800", 312.0),
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"L40S", 362.0),
    (r"\bA10\b", 125.0),
)


def device_peak_flops(device_name: str, override_tflops: float | None) -> float | None:
    """Dense half-precision peak in FLOP/s; None if unknown (CPUs, other devices)."""
    if override_tflops is not None:
        return override_tflops * 1e12
    for pattern, tflops in _DENSE_PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return None if tflops is None else tflops * 1e12
    return None
