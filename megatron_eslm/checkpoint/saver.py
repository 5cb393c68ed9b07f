"""Saves of a run: files are written by a thread of each rank, and ranks agree between steps.

The thread of a rank first writes that rank's files, then that of rank 0 publishes the checkpoint.
It takes part in no collective, so it can neither hang with another rank nor disturb the order of
training's collectives. The main thread asks after each step whether the threads of all ranks have
ended; then it shares their results or errors and begins the second stage.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eslm.checkpoint.host_copies import HostCopies
from megatron_eslm.checkpoint.save import Draft, begin_draft
from megatron_eslm.checkpoint.save_folder import SaveFolder
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.engine.engine import Engine
from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.collectives import all_reduce_, on_every_rank
from megatron_eslm.watchdog.phases import Phases

logger = logging.getLogger(__name__)

_FAILED, _WRITING, _ENDED = -1, 0, 1


class CheckpointSaver:
    """Saves checkpoints of a run, one at a time. All methods are collective.

    saver.begin(state)             # training may go on
    saver.look()                   # after each step: the checkpoint, once it is complete
    saver.finish()                 # wait for it
    saver.save(state)              # begin and finish; without copies if none were made before
    """

    def __init__(
        self,
        engine: Engine,
        saves: SaveFolder,
        *,
        run: dict[str, Any],
        tokenizer: Any,
        keep_last: int,
        phases: Phases,
    ) -> None:
        """Args:
        engine: the training engine.
        saves: folder of checkpoints, locked by rank 0.
        run: contents of run.json.
        tokenizer: the tokenizer of the data.
        keep_last: number of complete checkpoints to keep; 0 keeps all.
        phases: phases of this rank.
        """
        self._engine, self._saves, self._phases = engine, saves, phases
        self._run, self._tokenizer, self._keep_last = run, tokenizer, keep_last
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._draft: Draft | None = None
        self._files: Future = Future()
        """What the thread does for the draft."""
        self._publishes = False
        """Whether that is the second stage."""

    @property
    def under_way(self) -> Path | None:
        """The checkpoint that is not complete yet; the same on every rank."""
        return None if self._draft is None else self._draft.folder

    def save(self, state: TrainState) -> Path:
        """Save and wait for it; raises ConfigError on every rank if it could not be written."""
        # Memory that holds copies already takes these, too.
        self._begin(state, self._copies if self._copies.num_bytes else None)
        folder = self.finish()
        assert folder is not None
        return folder

    def begin(self, state: TrainState) -> None:
        """Begin a save; training may go on, but another save may not begin before `finish`."""
        self._begin(state, self._copies)

    def look(self) -> Path | None:
        """Go on with the save under way, if all ranks have come so far.

        Returns:
            The checkpoint, if it has become complete.

        Raises:
            ConfigError: it could not be written; raised on every rank.
        """
        if self._draft is None or self._slowest() == _WRITING:
            return None
        return self._advance()

    def finish(self) -> Path | None:
        """Wait for the save under way; returns and raises as `look`."""
        folder = None
        while self._draft is not None:
            folder = self._advance()
        return folder

    def _begin(self, state: TrainState, copies: HostCopies | None) -> None:
        assert self._draft is None, "one save at a time"
        with self._waiting():
            draft = begin_draft(
                self._engine,
                self._saves,
                state=state,
                run=self._run,
                tokenizer=self._tokenizer,
                copies=copies,
            )
        self._draft, self._publishes = draft, False
        self._files = self._thread.submit(draft.write)

    def _slowest(self) -> int:
        """Where the thread that is least far stands; one that has failed counts as that."""
        if not self._files.done():
            stands = _WRITING
        else:
            stands = _ENDED if self._files.exception() is None else _FAILED
        with self._waiting():
            least = torch.tensor([stands], device=self._engine.device)
            return int(all_reduce_(least, dist.group.WORLD, dist.ReduceOp.MIN))

    def _advance(self) -> Path | None:
        """Wait for the threads; begin the second stage, or return the complete checkpoint."""
        draft = self._draft
        assert draft is not None
        # Not a phase that waits for other ranks: a rank whose disk hangs is the one at fault.
        with self._phases("writing checkpoint files"):
            concurrent.futures.wait([self._files])
        with self._waiting():
            try:
                entries = on_every_rank(self._files.result)
            except ConfigError:
                self._draft = None
                if dist.get_rank() == 0:
                    draft.discard()
                raise
            if self._publishes:
                self._draft = None
                return draft.folder
            shares: list = [None] * dist.get_world_size()
            dist.all_gather_object(shares, entries)
        self._publishes = True
        files = {name: entry for share in shares for name, entry in share.items()}
        self._files = self._thread.submit(self._second_stage(draft, files))
        return None

    def _second_stage(self, draft: Draft, files: dict[str, Any]) -> Callable[[], None]:
        if dist.get_rank() != 0:
            return lambda: None
        return lambda: draft.publish(files, self._keep_last)

    def _waiting(self) -> Any:
        return self._phases("checkpoint", waits=dist.get_world_size() > 1)
