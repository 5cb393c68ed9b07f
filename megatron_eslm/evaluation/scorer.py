"""Log-probabilities and likeliest next tokens under a frozen model.

Rows of equal inputs are computed once, so two answers of one token each after one context cost one
row. Rows are sorted by length and batched by tokens; shorter ones are padded on the right, which a
causal model does not see.

Shape legend: M rows, T positions, E hidden, N tokens to score, V rows of this rank's shard of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_eslm.frozen.model import FrozenModel
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.head.statistics import VocabShard, chunk_rows, head_statistics
from megatron_eslm.parallel.collectives import all_reduce_

Progress = Callable[[int], object]
"""Called with the number of requests that were answered since the last call."""


class Wanted(NamedTuple):
    """Ids to score, and what the model reads for it."""

    inputs: tuple[int, ...]
    """Ids that the model reads; at most its positions."""
    labels: tuple[int, ...]
    """Ids to score: the last ones of what follows `inputs`, each predicted from all before it."""


class Score(NamedTuple):
    """What the model thinks of `Wanted.labels`."""

    log_probability: float
    """Of all labels together, in nats."""
    greedy: bool
    """Whether each label is the likeliest token."""


class Scorer:
    """Scores and continues rows of ids. Under tensor parallelism, ranks of one group call alike."""

    def __init__(
        self,
        model: FrozenModel,
        shape: ModelShape,
        tp_group: dist.ProcessGroup | None,
        batch_tokens: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            model: this rank's shard.
            shape: its shape; rows of the head beyond `vocab_size` are padding: they take no
                probability and are never the likeliest.
            tp_group: ranks that hold the model's shards.
            batch_tokens: tokens in a forward pass, padding included; one row may have more.
            beat: called before each forward pass.
        """
        self.positions = shape.max_position_embeddings
        self.batch_tokens = batch_tokens
        self.device = model.weight_VE.device
        self._model, self._beat = model, beat
        self._shard = VocabShard.of(shape.vocab_size, shape.padded_vocab_size, tp_group)

    def score(
        self, wanted: Sequence[Wanted], progress: Progress = lambda done: None
    ) -> list[Score]:
        """Score each request; what else is in its batch changes nothing but rounding."""
        users: dict[tuple[int, ...], list[int]] = {}
        for number, each in enumerate(wanted):
            assert 0 < len(each.labels) <= len(each.inputs) <= self.positions, each
            users.setdefault(each.inputs, []).append(number)
        scores: dict[int, Score] = {}
        for rows in self._batches(list(users)):
            asked = [(row, number) for row, ids in enumerate(rows) for number in users[ids]]
            places: list[tuple[int, int]] = []
            labels: list[int] = []
            for row, number in asked:
                own = wanted[number].labels
                first = len(rows[row]) - len(own)
                places += [(row, first + i) for i in range(len(own))]
                labels += own
            loss_N, greedy_N = self._head(self._hidden(rows), places, labels)
            lengths = [len(wanted[number].labels) for _, number in asked]
            parts = zip(loss_N.split(lengths), greedy_N.split(lengths), strict=True)
            for (_, number), (loss, greedy) in zip(asked, parts, strict=True):
                scores[number] = Score(-float(loss.double().sum()), bool(greedy.all()))
            progress(len(asked))
        return [scores[number] for number in range(len(wanted))]

    def extend(
        self,
        rows: Sequence[Sequence[int]],
        most: Sequence[int],
        take: Callable[[int, int], bool],
    ) -> None:
        """Continue rows by their likeliest tokens, for as long as each wants more.

        Args:
            rows: ids of each, one or more.
            most: new ids that each takes at most; with its own ids at most the positions.
            take: called with the number of a row and its likeliest next id; whether it goes on.
        """
        lengths = [len(row) + new for row, new in zip(rows, most, strict=True)]
        order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
        begin = 0
        while begin < len(rows):
            room = lengths[order[begin]]
            running = order[begin : begin + max(1, self.batch_tokens // room)]
            begin += len(running)
            self._beat()
            decoding = self._model.decoding([rows[number] for number in running], room)
            while True:
                ids = self._likeliest(decoding.last_MD @ self._model.weight_VE.t()).tolist()
                goes_on = [
                    place
                    for place, (number, new) in enumerate(zip(running, ids, strict=True))
                    if take(number, new)
                ]
                if not goes_on:
                    break
                if len(goes_on) < len(running):
                    decoding.keep(goes_on)
                running = [running[place] for place in goes_on]
                self._beat()
                decoding.append([ids[place] for place in goes_on])

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """The rows, longest first, so that what does not fit into memory fails at once."""
        rows.sort(key=len, reverse=True)
        begin = 0
        while begin < len(rows):
            size = max(1, self.batch_tokens // len(rows[begin]))
            yield rows[begin : begin + size]
            begin += size

    def _hidden(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Normalised hidden states [M, T, E]."""
        self._beat()
        tokens_MU = torch.zeros(len(rows), max(map(len, rows)) + 1, dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens_MU[number, : len(row)] = torch.tensor(row)
        return self._model.hidden(tokens_MU.to(self.device)).transpose(0, 1)

    def _head(
        self, hidden_MTE: torch.Tensor, places: list[tuple[int, int]], labels: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses, float32 [N], and whether the label is the likeliest, bool [N]; on the CPU."""
        row_N, position_N = torch.tensor(places, device=self.device).unbind(1)
        labels_N = torch.tensor(labels, device=self.device)
        losses, greedy = [], []
        size = chunk_rows(self._shard.num_rows)
        for begin in range(0, len(labels), size):
            part = slice(begin, begin + size)
            statistics = head_statistics(
                hidden_MTE[row_N[part], position_N[part]],
                self._model.weight_VE,
                labels_N[part],
                self._shard,
                entropy=False,
                keep_logits=True,
            )
            assert statistics.logits_NV is not None
            losses.append(statistics.loss_N)
            greedy.append(self._likeliest(statistics.logits_NV) == labels_N[part])
        return torch.cat(losses).cpu(), torch.cat(greedy).cpu()

    def _likeliest(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """int64 [N], the id of the largest logit over all shards; of equal ones the first."""
        shard = self._shard
        if shard.num_real:
            best_N, id_N = logits_NV[:, : shard.num_real].float().max(dim=1)
        else:  # the shard is all padding
            best_N = logits_NV.new_full((len(logits_NV),), -torch.inf, dtype=torch.float32)
            id_N = torch.zeros_like(best_N, dtype=torch.int64)
        if shard.group is None or shard.group.size() == 1:
            return id_N
        overall_N = best_N.clone()
        all_reduce_(overall_N, shard.group, dist.ReduceOp.MAX)
        id_N = torch.where(best_N == overall_N, id_N + shard.start, 2**31)
        all_reduce_(id_N, shard.group, dist.ReduceOp.MIN)
        return id_N
