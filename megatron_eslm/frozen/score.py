"""Score a `.bin` once with a reference model, for `--reference-losses`.

The losses belong to tokens, not to training sequences, whose contexts depend on seed, mixture and
sequence length. So the contexts here are independent of training: each document is cut into
windows, and a token is predicted from the earlier tokens in its window. Training packs documents
end to end and cuts elsewhere, so these losses approximate those of `--reference` (docs/data.md).

Shape legend: M rows, T positions, U = T + 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from megatron_eslm.data.index_file import IndexFile, read_index
from megatron_eslm.data.reference_losses import ReferenceMeta, ReferenceWriter, data_fingerprint
from megatron_eslm.frozen.reference import ReferenceModel
from megatron_eslm.model.arithmetic import forward_flops

_BATCHES_A_CHUNK = 16
"""Forward passes per chunk. Windows are sorted by length within a chunk, and losses are stored per
chunk, so a kill loses at most one chunk."""


class Window(NamedTuple):
    """A range of tokens of a `.bin` predicted from one context."""

    begin: int
    end: int
    """One past the last."""
    starts_document: bool


def windows(index: IndexFile, seq_length: int, begin: int = 0) -> Iterator[Window]:
    """Yield windows of `seq_length` tokens per document, from token `begin` on."""
    ends = np.cumsum(index.lengths, dtype=np.int64)
    for document in range(int(np.searchsorted(ends, begin, side="right")), len(ends)):
        start = int(ends[document]) - int(index.lengths[document])
        for first in range(start, int(ends[document]), seq_length):
            if first >= begin:
                last = min(first + seq_length, int(ends[document]))
                yield Window(first, last, first == start)


class Scored(NamedTuple):
    """Result of scoring one pair."""

    tokens: int
    """Tokens scored in this call, without those scored earlier."""
    total_loss: float
    """Sum of the losses of these tokens, in nats."""
    flops: float
    """FLOPs of the matrix products for these tokens."""


def score_pair(
    model: ReferenceModel,
    prefix: str,
    name: str,
    *,
    eod: int,
    seq_length: int,
    batch_size: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Score all tokens of one pair that are not scored yet and store their losses.

    Documents are cut into windows of `seq_length` tokens, and each token is predicted from the
    earlier tokens of its window, or from an end-of-document id if it begins a document.

    Args:
        model: the reference model, on any device.
        prefix: prefix of the pair.
        name: name of the losses.
        eod: the end-of-document id.
        seq_length: window length; at most the model's number of positions.
        batch_size: windows per forward pass; affects losses only by rounding.
        overwrite: start over, replacing existing losses.
        progress: called with (tokens scored, tokens of the pair) after each chunk.

    Raises:
        ConfigError: the pair is unusable, or this name has other losses.
    """
    index = read_index(prefix)
    meta = ReferenceMeta(
        data=data_fingerprint(index),
        weights=model.fingerprint(),
        seq_length=seq_length,
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=index.tokens,
    )
    total_loss = flops = 0.0
    with ReferenceWriter(prefix, name, meta, overwrite) as writer:
        before, ids = writer.scored, index.ids()
        todo = windows(index, seq_length, before)
        while chunk := list(itertools.islice(todo, _BATCHES_A_CHUNK * batch_size)):
            begin = chunk[0].begin
            losses = np.empty(chunk[-1].end - begin, dtype=np.float32)
            # Batch windows of similar length, to reduce padding.
            chunk.sort(key=lambda window: window.begin - window.end)
            for first in range(0, len(chunk), batch_size):
                batch = chunk[first : first + batch_size]
                for window, scores in zip(batch, _score(model, ids, batch, eod), strict=True):
                    losses[window.begin - begin : window.end - begin] = scores
                longest = batch[0].end - batch[0].begin
                flops += forward_flops(
                    model.shape,
                    positions=len(batch) * longest,
                    length=longest,
                    scored=sum(window.end - window.begin for window in batch),
                )
            writer.append(losses)
            total_loss += float(losses.sum(dtype=np.float64))
            if progress is not None:
                progress(writer.scored, index.tokens)
    return Scored(index.tokens - before, total_loss, flops)


def _score(
    model: ReferenceModel, ids: np.ndarray, batch: list[Window], eod: int
) -> Iterator[np.ndarray]:
    """Yield the losses of each window, float32, from one forward pass; the first is the longest."""
    width = batch[0].end - batch[0].begin
    tokens_MU = np.full((len(batch), width + 1), eod, dtype=np.int64)
    wanted_MT = np.zeros((len(batch), width), dtype=bool)
    for row, window in enumerate(batch):
        length = window.end - window.begin
        if not window.starts_document:
            tokens_MU[row, 0] = ids[window.begin - 1]
        tokens_MU[row, 1 : length + 1] = ids[window.begin : window.end]
        wanted_MT[row, :length] = True
    tokens, wanted = (torch.from_numpy(x).to(model.device) for x in (tokens_MU, wanted_MT))
    losses_MT = model.losses(tokens, tokens[:, 1:], wanted).cpu().numpy()
    for window, losses_T in zip(batch, losses_MT, strict=True):
        yield losses_T[: window.end - window.begin]
