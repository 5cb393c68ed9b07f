"""Continue rows a token at a time, with the keys and values of what was read kept.

Shape legend: M rows, T positions, P positions that there is room for, D hidden, G key-value heads
of this rank, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F

from megatron_eslm.data.documents import MaskAndPositions
from megatron_eslm.model.gpt import GPT
from megatron_eslm.model.layers import Attention, Block


class Decoding:
    """Rows that a full model has read, and reads on by one token each.

    Equal, to rounding, to reading each row alone from its beginning. Rows may differ in length:
    shorter ones are padded on the right, and what padding left in the cache is overwritten before
    any token can attend to it. Under tensor parallelism, the ranks of one group call alike.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, rows: Sequence[Sequence[int]], room: int) -> None:
        """
        Args:
            model: a full model in evaluation mode, without document rules.
            rows: ids of each row, one or more.
            room: length up to which the longest row may grow; at most the model's positions.
        """
        assert model.is_first and model.is_last and model.settings.documents is None
        self._model = model
        device = model.output_layer.weight.device
        self._lengths_M = torch.tensor([len(row) for row in rows], device=device)
        tokens_MT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens_MT[number, : len(row)] = torch.tensor(row)
        self._blocks = [cast(Block, block) for block in model.blocks.values()]
        self._cache = [_Cache(block.attention, len(rows), room) for block in self._blocks]
        positions_T = torch.arange(tokens_MT.shape[1], device=device)
        hidden_TMD = self._read(tokens_MT.to(device), positions_T[:, None].expand(-1, len(rows)))
        self.last_MD = hidden_TMD[self._lengths_M - 1, torch.arange(len(rows), device=device)]
        """Normalised hidden state of the last token of each row."""

    @torch.no_grad()
    def append(self, ids: Sequence[int]) -> None:
        """Read another token of each row."""
        tokens_M1 = torch.tensor(ids, device=self._lengths_M.device)[:, None]
        self.last_MD = self._read(tokens_M1, self._lengths_M[None])[0]
        self._lengths_M = self._lengths_M + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        rows_K = torch.tensor(rows, device=self._lengths_M.device)
        self._lengths_M, self.last_MD = self._lengths_M[rows_K], self.last_MD[rows_K]
        for cache in self._cache:
            cache.keep(rows_K)

    def _read(self, tokens_MT: torch.Tensor, positions_TM: torch.Tensor) -> torch.Tensor:
        """Normalised hidden states [T, M, D] of the tokens at these positions."""
        model = self._model
        # The embedding takes T + 1 tokens and ignores the last, so any id serves there.
        hidden_TMD = model.embedding(
            F.pad(tokens_MT, (0, 1)), documents=MaskAndPositions(None, positions_TM)
        )
        for block, cache in zip(self._blocks, self._cache, strict=True):
            hidden_TMD = hidden_TMD + cache.attend(block.norm1(hidden_TMD), positions_TM)
            hidden_TMD = hidden_TMD + block.mlp(block.norm2(hidden_TMD))
        return model.final_norm(hidden_TMD)


class _Cache:
    """Keys and values of one block."""

    def __init__(self, attention: Attention, num_rows: int, room: int) -> None:
        weight = attention.qkv.weight
        shape = (num_rows, attention.num_groups_local, room, attention.head_dim)
        self._attention = attention
        self._keys_MGPC, self._values_MGPC = weight.new_zeros(shape), weight.new_zeros(shape)
        if attention.layout.rotary is not None:
            attention.layout.rotary.tables(room, weight)  # long enough for all later positions

    def attend(self, x_TMD: torch.Tensor, positions_TM: torch.Tensor) -> torch.Tensor:
        """Attention of all rows from their beginning, or of one further token of each."""
        attention = self._attention
        q, k, v = attention.heads(attention.qkv(x_TMD)[0], positions_TM)
        if len(x_TMD) > 1:
            self._keys_MGPC[:, :, : len(x_TMD)] = k
            self._values_MGPC[:, :, : len(x_TMD)] = v
            return attention.mixed(q, k, v)
        rows_M, position_M = torch.arange(len(q), device=q.device), positions_TM[0]
        self._keys_MGPC[rows_M, :, position_M] = k[:, :, 0]
        self._values_MGPC[rows_M, :, position_M] = v[:, :, 0]
        places_P = torch.arange(self._keys_MGPC.shape[2], device=q.device)
        seen_M11P = (places_P <= position_M[:, None])[:, None, None]
        return attention.mixed(q, self._keys_MGPC, self._values_MGPC, seen_M11P)

    def keep(self, rows_K: torch.Tensor) -> None:
        self._keys_MGPC = self._keys_MGPC[rows_K]
        self._values_MGPC = self._values_MGPC[rows_K]
