"""Ghost products: inner products of per-sequence gradients without the gradients themselves.

The gradient of a linear layer's weight for sequence m is sum_t b_mt a_mt^T, with inputs a and
output gradients b. Hence

    <g_m, g_n> = sum_{t,t'} (a_mt . a_nt') (b_mt . b_nt')

needs only products between positions (Wang et al., 2024, GREATS); per-sequence gradients of a
matrix are never materialized. The validation gradient G is one sum over its sequences and is
materialized one layer at a time, like any training gradient: <g_m, G> = sum_t b_mt . (G a_mt).

Shape legend: R sequences, the first M of them candidates, the rest validation; N candidates of one
chunk; T positions; D inputs, F outputs of a layer; V vocabulary. Inputs are in the compute dtype;
products accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_eslm.ops.head.statistics import CHUNK_BYTES, chunk_rows


@dataclass
class GradientProducts:
    """Inner products of gradients, summed over layers."""

    pairs_MM: torch.Tensor
    """float32, <g_m, g_n> of candidates."""
    validation_M: torch.Tensor
    """float32, <g_m, G> with the validation gradient."""

    def __iadd__(self, other: GradientProducts) -> GradientProducts:
        self.pairs_MM += other.pairs_MM
        self.validation_M += other.validation_M
        return self

    @classmethod
    def zeros(cls, num_candidates: int, device: torch.device) -> GradientProducts:
        """Return zeros, to which layers' products are added."""
        pairs_MM = torch.zeros(num_candidates, num_candidates, device=device)
        return cls(pairs_MM, torch.zeros(num_candidates, device=device))


@torch.no_grad()
def linear_products(
    inputs_RTD: torch.Tensor,
    grads_RTF: torch.Tensor,
    num_candidates: int,
    *,
    bias: bool,
    chunk_bytes: int = CHUNK_BYTES,
) -> GradientProducts:
    """Compute products for a linear layer's weight [F, D] and, with `bias`, its bias [F].

    Args:
        inputs_RTD: a, the layer's inputs.
        grads_RTF: b, gradients at the layer's output.
        num_candidates: M.
        bias: whether the layer has a bias; it counts as a weight with input 1.
        chunk_bytes: size of the transient float32 products between positions.
    """
    inputs_RTD, grads_RTF = _wide(inputs_RTD), _wide(grads_RTF)
    a_MTD, b_MTF = inputs_RTD[:num_candidates], grads_RTF[:num_candidates]

    def pair(m: int, some: slice) -> torch.Tensor:
        inputs_TNT = _similarity(a_MTD[m], a_MTD[some])
        if bias:
            inputs_TNT += 1.0
        return inputs_TNT.mul_(_similarity(b_MTF[m], b_MTF[some])).sum(dim=(0, 2))

    a_ID, b_IF = inputs_RTD[num_candidates:].flatten(0, 1), grads_RTF[num_candidates:].flatten(0, 1)
    validation_M = _contract(b_MTF @ (b_IF.t() @ a_ID), a_MTD)
    if bias:
        validation_M += b_MTF.float().sum(dim=1) @ b_IF.float().sum(dim=0)
    return GradientProducts(_pairwise(a_MTD, pair, chunk_bytes), validation_M)


@torch.no_grad()
def vector_products(grads_RD: torch.Tensor, num_candidates: int) -> GradientProducts:
    """Compute products for parameters small enough to store a gradient [D] per sequence."""
    g_MD = grads_RD[:num_candidates].float()
    return GradientProducts(g_MD @ g_MD.t(), g_MD @ grads_RD[num_candidates:].float().sum(dim=0))


@dataclass(frozen=True)
class HeadGradients:
    """Gradients of the sum of token losses with respect to the head's input, logits and weight."""

    hidden_RTD: torch.Tensor
    """Gradients at the head's input, in the compute dtype."""
    logits_MTV: torch.Tensor
    """Candidates' gradients at the logits, in the compute dtype."""
    validation_VD: torch.Tensor
    """float32, gradient of the head's weight, summed over the validation sequences."""


@torch.no_grad()
def head_gradients(
    normed_RTD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_RT: torch.Tensor,
    valid_RT: torch.Tensor,
    num_candidates: int,
    vocab_size: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> HeadGradients:
    """Compute gradients of sum_{valid t} -log p(label_t) for each sequence.

    Sums rather than means: gradients of means are too small for half precision.

    Args:
        normed_RTD: normalised hidden states.
        weight_VD: the unsharded head; rows from `vocab_size` on are padding.
        labels_RT: int64, next tokens.
        valid_RT: bool, whether each label counts.
        num_candidates: M.
        vocab_size: number of real token ids.
        chunk_bytes: size of the transient float32 logits.
    """
    rows, positions, _ = normed_RTD.shape
    hidden_RTD = torch.empty_like(normed_RTD)
    logits_MTV = normed_RTD.new_zeros(num_candidates, positions, len(weight_VD))
    validation_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    step = chunk_rows(len(weight_VD), chunk_bytes)
    for row in range(rows):
        for first in range(0, positions, step):
            at = (row, slice(first, first + step))
            z_CV = (normed_RTD[at] @ weight_VD.t())[:, :vocab_size].float().softmax(dim=1)
            z_CV.scatter_add_(
                1, labels_RT[at][:, None], z_CV.new_full((), -1.0).expand(len(z_CV), 1)
            )
            z_CV = (z_CV * valid_RT[at][:, None]).to(normed_RTD.dtype)
            hidden_RTD[at] = z_CV @ weight_VD[:vocab_size]
            if row < num_candidates:
                logits_MTV[row, at[1], :vocab_size] = z_CV
            else:
                validation_VD[:vocab_size] += z_CV.t() @ normed_RTD[at]
    return HeadGradients(hidden_RTD, logits_MTV, validation_VD)


@torch.no_grad()
def tied_embedding_products(
    head: HeadGradients,
    normed_RTD: torch.Tensor,
    tokens_RT: torch.Tensor,
    lookup_grads_RTD: torch.Tensor,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> GradientProducts:
    """Compute products for a word embedding tied to the head; its gradient sums both uses.

    g_m = sum_t onehot(token_mt) l_mt^T + z_mt n_mt^T, so pairs have four terms: lookup with lookup,
    head with head, and two cross terms.

    Args:
        head: from `head_gradients`.
        normed_RTD: n, the head's input.
        tokens_RT: int64, the tokens looked up.
        lookup_grads_RTD: l, gradients at the lookup's output.
        chunk_bytes: size of the transient float32 products between positions.
    """
    num_candidates = len(head.logits_MTV)
    z_MTV, ids_MT = _wide(head.logits_MTV), tokens_RT[:num_candidates]
    n_MTD = _wide(normed_RTD[:num_candidates])
    l_MTD = _wide(lookup_grads_RTD[:num_candidates])

    def pair(m: int, some: slice) -> torch.Tensor:
        same_TNT = (ids_MT[m][:, None, None] == ids_MT[some]).float()
        total_TNT = same_TNT.mul_(_similarity(l_MTD[m], l_MTD[some]))
        total_TNT += _similarity(z_MTV[m], z_MTV[some]).mul_(_similarity(n_MTD[m], n_MTD[some]))
        here_TNT = z_MTV[m][:, ids_MT[some]]  # head of m with lookups of the others
        total_TNT += _similarity(n_MTD[m], l_MTD[some]).mul_(here_TNT)
        there_TNT = z_MTV[some][:, :, ids_MT[m]].permute(2, 0, 1)
        total_TNT += _similarity(l_MTD[m], n_MTD[some]).mul_(there_TNT)
        return total_TNT.sum(dim=(0, 2))

    validation_VD = head.validation_VD.index_add(
        0,
        tokens_RT[num_candidates:].flatten(),
        lookup_grads_RTD[num_candidates:].flatten(0, 1).float(),
    )
    validation_M = _contract(z_MTV @ validation_VD.to(z_MTV.dtype), n_MTD)
    validation_M += _contract(validation_VD[ids_MT], l_MTD)
    return GradientProducts(_pairwise(n_MTD, pair, chunk_bytes), validation_M)


def _pairwise(
    like_MTD: torch.Tensor, pair: Callable[[int, slice], torch.Tensor], chunk_bytes: int
) -> torch.Tensor:
    """float32 [M, M], filled from pair(m, some) -> float32 [N], called once per pair."""
    num, positions, _ = like_MTD.shape
    pairs_MM = torch.zeros(num, num, device=like_MTD.device)
    step = max(1, chunk_bytes // (4 * positions**2))
    for m in range(num):
        for first in range(m, num, step):
            some = slice(first, first + step)
            pairs_MM[m, some] = pair(m, some)
    return pairs_MM + pairs_MM.triu(1).t()


def _similarity(x_TD: torch.Tensor, y_NTD: torch.Tensor) -> torch.Tensor:
    """float32 [T, N, T], x_t . y_nt'."""
    return (x_TD @ y_NTD.flatten(0, 1).t()).float().view(len(x_TD), *y_NTD.shape[:2])


def _contract(x_MTD: torch.Tensor, y_MTD: torch.Tensor) -> torch.Tensor:
    """float32 [M], sums of products."""
    return (x_MTD.float() * y_MTD.float()).sum(dim=(1, 2))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Convert float16 to float32: sums of many float16 products overflow."""
    return x.float() if x.dtype == torch.float16 else x
