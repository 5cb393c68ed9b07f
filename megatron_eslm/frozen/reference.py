"""A frozen reference model, for selection by excess loss.

During training (`--reference`) it scores each micro-batch in exactly its training context. It is
on the last pipeline stage, which scores tokens, or on every stage if all score sequences, each time
sharded over the stage's tensor-parallel ranks. Before training it can score a `.bin` once
(score.py).

Shape legend: M rows, T positions, U = T + 1, D hidden, N tokens to score.
"""

from __future__ import annotations

import hashlib

import torch

from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.batch import Batch
from megatron_eslm.data.documents import DocumentRules
from megatron_eslm.data.tokenizers.build import Tokenizer
from megatron_eslm.frozen.model import (
    FrozenModel,
    FrozenSource,
    check_fits,
    find_frozen,
    load_frozen,
)
from megatron_eslm.model.architectures.base import PADDED
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.head.contract import HeadKernel
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics
from megatron_eslm.parallel.collectives import on_every_rank
from megatron_eslm.parallel.mesh import Mesh


class ReferenceModel:
    """A frozen GPT that scores labels. Not a submodule of any model, so no engine includes it."""

    def __init__(
        self, frozen: FrozenModel, shape: ModelShape, mesh: Mesh, head_kernel: HeadKernel
    ) -> None:
        self.shape = shape
        self._frozen = frozen
        self._shard = VocabShard.of(
            shape.vocab_size, shape.padded_vocab_size, mesh.tp_group, head_kernel
        )

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._frozen.weight_VE.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self._frozen.weight_VE.dtype

    def fingerprint(self) -> str:
        """Hash the weights, without vocabulary padding. On a single rank only."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self._frozen.named_parameters()):
            real = parameter[: self.shape.vocab_size] if name in PADDED else parameter
            digest.update(f"{name} {list(real.shape)}".encode())
            digest.update(real.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Score a batch: float32 [M, T] losses of its labels, 0 for labels that do not count."""
        return self.losses(batch.tokens_MU, batch.labels_MT, batch.valid_MT)

    @torch.no_grad()
    def losses(
        self, tokens_MU: torch.Tensor, labels_MT: torch.Tensor, wanted_MT: torch.Tensor
    ) -> torch.Tensor:
        """Compute losses of labels, in nats.

        Args:
            tokens_MU: int64 [M, T+1]; the last column is not read.
            labels_MT: int64 [M, T].
            wanted_MT: bool [M, T], the labels to score.

        Returns:
            float32 [M, T], 0 for labels not scored.
        """
        normed_ND = self._frozen.hidden(tokens_MU).transpose(0, 1)[wanted_MT]
        statistics = head_statistics(
            normed_ND, self._frozen.weight_VE, labels_MT[wanted_MT], self._shard, entropy=False
        )
        losses_MT = torch.zeros(wanted_MT.shape, dtype=torch.float32, device=wanted_MT.device)
        losses_MT[wanted_MT] = statistics.loss_N
        return losses_MT


def find_run_reference(
    run: RunConfig, shape: ModelShape, tokenizer: Tokenizer
) -> FrozenSource | None:
    """Find the model of `--reference`; None without the flag. No tensor is read.

    Args:
        run: the run.
        shape: shape of the trained model, which gives the vocabulary padding.
        tokenizer: tokenizer of the data.

    Raises:
        ConfigError: there is no model, or it cannot score this run's sequences in this layout.
    """
    folder = run.reference.reference
    if folder is None:
        return None
    source = find_reference("--reference", folder, tokenizer)
    stored = "score the text once with tools/score_reference.py and use --reference-losses"
    check_fits(source, run, f"--reference {folder}", stored)
    return source.beside(shape)


def find_reference(
    flag: str, folder: str, tokenizer: Tokenizer, tag: str | None = None
) -> FrozenSource:
    """Find a reference model for data of this tokenizer; see `find_frozen`."""
    return find_frozen(flag, folder, tokenizer, "reference model", tag)


def load_reference(
    source: FrozenSource,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    head_kernel: HeadKernel = "auto",
    documents: DocumentRules | None = None,
    every_stage: bool = False,
) -> ReferenceModel | None:
    """Load the reference model on the last pipeline stage, or on every one. Collective.

    Returns:
        None on stages without it.
    """

    def load() -> ReferenceModel | None:
        if not (mesh.is_last_stage or every_stage):
            return None
        frozen = load_frozen(source, mesh, dtype, device, documents)
        return ReferenceModel(frozen, source.shape, mesh, head_kernel)

    return on_every_rank(load)
