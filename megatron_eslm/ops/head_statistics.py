"""Per-token loss and entropy of a vocabulary-parallel head, without float32 logits.

Shape legend: N tokens, D hidden, V rows of this rank's vocabulary shard, C tokens of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_eslm.parallel.collectives import all_reduce_

CHUNK_BYTES = 128 * 2**20
"""Float32 bytes of the transient [C, V] block of logits; the full [N, V] never exists in float32
unless the model itself computes in float32 and keeps its logits."""


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

    @classmethod
    def of(
        cls, vocab_size: int, padded_vocab_size: int, group: dist.ProcessGroup | None = None
    ) -> VocabShard:
        """The shard of this rank of `group`; padded_vocab_size must divide by the group size."""
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        assert padded_vocab_size % size == 0, (padded_vocab_size, size)
        rows = padded_vocab_size // size
        start = rank * rows
        return cls(start, rows, max(0, min(rows, vocab_size - start)), group)

    def localise(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels as indices into this shard (0 where elsewhere) and where they are in it."""
        local = labels - self.start
        here = (local >= 0) & (local < self.num_real)
        return torch.where(here, local, 0), here


@dataclass(frozen=True)
class HeadStatistics:
    """What one pass over the logits yields."""

    loss_N: torch.Tensor
    """float32, -log p(label), in nats."""
    log_sum_exp_N: torch.Tensor
    """float32."""
    entropy_N: torch.Tensor | None
    """float32, -sum p log p, in nats."""
    logits_NV: torch.Tensor | None
    """Logits of this rank's shard in the compute type, where they were kept."""


def chunk_rows(num_rows_vocab: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Tokens a chunk, so that its float32 logits take at most `chunk_bytes`."""
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
    """Loss and, if asked for, entropy of every token from one pass over its logits.

    Two collectives over the shard's group whatever N: MAX of the maxima, then one SUM of
    [sum e^z, sum e^z z, z_label] with z shifted by the maximum; H = log S - (sum e^z z) / S.

    Args:
        hidden_ND: [N, D] normalised hidden states in the compute type.
        weight_VD: [V, D] this rank's rows of the head, same type.
        labels_N: int64 [N], global token ids.
        shard: which rows these are.
        entropy: whether to compute the entropy.
        keep_logits: whether to keep the logits in the compute type for the backward pass.
        chunk_bytes: size of the transient float32 block.

    Returns:
        HeadStatistics, float32 whatever the compute type. No gradient flows from it.
    """
    num_tokens = hidden_ND.shape[0]
    logits_NV = hidden_ND.new_empty(num_tokens, shard.num_rows) if keep_logits else None
    max_N = hidden_ND.new_empty(num_tokens, dtype=torch.float32)
    # rows: sum of exponentials, sum of exponential times shifted logit, label's logit
    sums_3N = hidden_ND.new_zeros(3, num_tokens, dtype=torch.float32)
    local_N, here_N = shard.localise(labels_N)

    step = chunk_rows(shard.num_rows, chunk_bytes)
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        if logits_NV is None:
            logits_CV = hidden_ND[rows] @ weight_VD.t()
        else:
            logits_CV = torch.mm(hidden_ND[rows], weight_VD.t(), out=logits_NV[rows])
        if shard.num_real == 0:  # a shard of nothing but padding
            max_N[rows] = -torch.inf
            continue
        z_CV = logits_CV[:, : shard.num_real].float()
        max_C = z_CV.amax(dim=1)
        max_N[rows] = max_C
        sums_3N[2, rows] = z_CV.gather(1, local_N[rows, None]).squeeze(1)
        z_CV = z_CV - max_C[:, None]
        exp_CV = z_CV.exp()
        sums_3N[0, rows] = exp_CV.sum(dim=1)
        if entropy:
            sums_3N[1, rows] = exp_CV.mul_(z_CV).sum(dim=1)

    if shard.group is not None and shard.group.size() > 1:
        shard_max_N = max_N.clone()
        all_reduce_(max_N, shard.group, dist.ReduceOp.MAX)
        if shard.num_real:
            shift_N = shard_max_N - max_N
            scale_N = shift_N.exp()
            sums_3N[1] = scale_N * (sums_3N[1] + shift_N * sums_3N[0])
            sums_3N[0] *= scale_N
        sums_3N[2].masked_fill_(~here_N, 0.0)
        all_reduce_(sums_3N, shard.group)

    log_sum_N = sums_3N[0].log()
    return HeadStatistics(
        loss_N=log_sum_N - (sums_3N[2] - max_N),
        log_sum_exp_N=log_sum_N + max_N,
        entropy_N=log_sum_N - sums_3N[1] / sums_3N[0] if entropy else None,
        logits_NV=logits_NV,
    )
