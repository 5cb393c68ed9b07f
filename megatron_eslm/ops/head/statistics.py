"""Per-token loss and entropy of a vocabulary-parallel head, without float32 logits.

Shape legend: N tokens, D hidden, V rows of this rank's vocabulary shard, C tokens of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_eslm.ops.head.contract import HeadKernel
from megatron_eslm.ops.head.dispatch import head_backend
from megatron_eslm.parallel.collectives import all_reduce_

CHUNK_BYTES = 128 * 2**20
"""Most bytes of a transient block of logits. The full [N, V] exists in float32 only if the model
computes in float32 and keeps its logits."""


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the head.

    Rows from `num_real` on are padding of the vocabulary: they take no probability and get no
    gradient.
    """

    start: int
    num_rows: int
    num_real: int
    group: dist.ProcessGroup | None = None
    kernel: HeadKernel = "auto"
    """Backend that computes statistics and gradients of these rows."""

    @classmethod
    def of(
        cls,
        vocab_size: int,
        padded_vocab_size: int,
        group: dist.ProcessGroup | None = None,
        kernel: HeadKernel = "auto",
    ) -> VocabShard:
        """This rank's shard; padded_vocab_size must be a multiple of the group size."""
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        assert padded_vocab_size % size == 0, (padded_vocab_size, size)
        rows = padded_vocab_size // size
        start = rank * rows
        return cls(start, rows, max(0, min(rows, vocab_size - start)), group, kernel)

    def localise(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels as indices into this shard (0 if outside), and whether each is inside."""
        local = labels - self.start
        here = (local >= 0) & (local < self.num_real)
        return torch.where(here, local, 0), here


@dataclass(frozen=True)
class HeadStatistics:
    """Statistics per token from one pass over the logits."""

    loss_N: torch.Tensor
    """float32, -log p(label), in nats."""
    log_sum_exp_N: torch.Tensor
    """float32."""
    entropy_N: torch.Tensor | None
    """float32, -sum p log p, in nats."""
    logits_NV: torch.Tensor | None
    """Logits of this rank's shard in the compute dtype, if kept."""


def chunk_rows(num_rows_vocab: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Tokens per chunk such that its float32 logits take at most `chunk_bytes`."""
    return max(1, chunk_bytes // (4 * num_rows_vocab))


@torch.no_grad()
def head_statistics(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    shard: VocabShard,
    *,
    entropy: bool,
    keep_logits: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> HeadStatistics:
    """Compute loss and, if requested, entropy of every token in one pass over the logits.

    Runs two collectives over the shard's group for any N: MAX of the maxima, then one SUM of
    [S = sum e^z, sum e^z z, z_label] with z shifted by the maximum; H = log S - (sum e^z z) / S.

    Args:
        hidden_ND: [N, D] normalised hidden states in the compute dtype.
        weight_VD: [V, D] this rank's rows of the head, same dtype.
        labels_N: int64 [N], global token ids.
        shard: this rank's vocabulary rows.
        entropy: whether to compute the entropy.
        keep_logits: whether to keep the logits in the compute dtype for the backward pass.
        chunk_bytes: most bytes of a transient block of logits.

    Returns:
        HeadStatistics, float32 for any compute dtype. No gradient flows through it.
    """
    num_tokens = hidden_ND.shape[0]
    logits_NV = hidden_ND.new_empty(num_tokens, shard.num_rows) if keep_logits else None
    local_N, here_N = shard.localise(labels_N)
    if shard.num_real:
        max_N, sums_3N = head_backend(shard.kernel, hidden_ND.device).partial_statistics(
            hidden_ND,
            weight_VD,
            torch.where(here_N, local_N, -1),
            shard.num_real,
            logits_NV,
            entropy=entropy,
            chunk_bytes=chunk_bytes,
        )
    else:  # the shard is all padding
        max_N = hidden_ND.new_full((num_tokens,), -torch.inf, dtype=torch.float32)
        sums_3N = hidden_ND.new_zeros(3, num_tokens, dtype=torch.float32)
        if logits_NV is not None:
            torch.mm(hidden_ND, weight_VD.t(), out=logits_NV)

    if shard.group is not None and shard.group.size() > 1:
        shard_max_N = max_N.clone()
        all_reduce_(max_N, shard.group, dist.ReduceOp.MAX)
        if shard.num_real:
            shift_N = shard_max_N - max_N
            scale_N = shift_N.exp()
            sums_3N[1] = scale_N * (sums_3N[1] + shift_N * sums_3N[0])
            sums_3N[0] *= scale_N
        all_reduce_(sums_3N, shard.group)

    log_sum_N = sums_3N[0].log()
    return HeadStatistics(
        loss_N=log_sum_N - (sums_3N[2] - max_N),
        log_sum_exp_N=log_sum_N + max_N,
        entropy_N=log_sum_N - sums_3N[1] / sums_3N[0] if entropy else None,
        logits_NV=logits_NV,
    )
