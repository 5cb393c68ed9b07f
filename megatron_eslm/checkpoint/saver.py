"""Saves of a run: files are written by a thread of each rank, and ranks agree between steps.

The thread of a rank writes that rank's files; that of rank 0 then waits for the others and
publishes the checkpoint. No thread takes part in a collective, so it can neither hang with another
rank nor disturb the order of training's collectives. The main thread asks after each step whether
the threads of all ranks have ended; then it shares their results or errors. If a step fails
meanwhile, on one rank or on all, the threads finish without the main ones.
"""

from __future__ import annotations

import concurrent.futures
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eslm.checkpoint.host_copies import HostCopies
from megatron_eslm.checkpoint.save import Draft, begin_draft
from megatron_eslm.checkpoint.save_folder import SaveFolder
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.checkpoint.written_files import WrittenFiles
from megatron_eslm.engine.engine import Engine
from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.collectives import all_reduce_, on_every_rank
from megatron_eslm.watchdog.phases import Phases

logger = logging.getLogger(__name__)

_FAILED, _WRITING, _ENDED = -1, 0, 1


@dataclass(frozen=True)
class _Save:
    """A save under way."""

    draft: Draft
    written: WrittenFiles
    stages: list[tuple[Future, bool]]
    """What the thread of this rank does, in order, and whether it waits for other ranks in it."""

    def results(self) -> None:
        """Raise what a stage that has ended has raised."""
        for stage, _ in self.stages:
            stage.result()


class CheckpointSaver:
    """Saves checkpoints of a run, one at a time.

    saver.begin(state)             # training may go on
    saver.poll()                   # after each step: the checkpoint, once it is complete
    saver.finish()                 # wait for it
    saver.save(state)              # begin and finish; without copies if none were made before
    saver.finish_alone()           # after an error of this rank; the only one not collective
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
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None

    @property
    def under_way(self) -> Path | None:
        """The checkpoint that is not complete yet; the same on every rank."""
        return None if self._save is None else self._save.draft.folder

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

    def poll(self) -> Path | None:
        """Complete the save under way if the threads of all ranks have ended, or one has failed.

        Returns:
            The checkpoint, if it has become complete.

        Raises:
            ConfigError: it could not be written; raised on every rank.
        """
        if self._save is None or self._least_progress(self._save) == _WRITING:
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the save under way; returns and raises as `poll`."""
        if self._save is None:
            return None
        save = self._save
        self._wait_for(save)
        with self._waiting():
            try:
                on_every_rank(save.results)
            except ConfigError:
                self._save = None
                if dist.get_rank() == 0:
                    save.draft.discard()
                raise
        self._save = None  # not where another rank is gone: `finish_alone` follows
        return save.draft.folder

    def finish_alone(self) -> Path | None:
        """Wait for the save under way, whatever the main threads of other ranks do.

        Returns:
            The checkpoint, if it has become complete.
        """
        if self._save is None:
            return None
        save, self._save = self._save, None
        self._wait_for(save)
        try:
            save.results()
            with self._waiting():
                complete = save.written.outcome(self._going_on)
        except ConfigError as error:
            logger.error("%s", error)  # the run ends with an earlier one
            complete = False
        if not complete and dist.get_rank() == 0:
            save.draft.discard()
        return save.draft.folder if complete else None

    def _begin(self, state: TrainState, copies: HostCopies | None) -> None:
        assert self._save is None, "one save at a time"
        with self._waiting():
            draft = begin_draft(
                self._engine,
                self._saves,
                state=state,
                run=self._run,
                tokenizer=self._tokenizer,
                copies=copies,
            )
        written = WrittenFiles(draft.path.name)
        begin = self._threads.submit  # there is one thread, which takes them in order
        stages: list[tuple[Future, bool]] = [(begin(self._write, draft, written), False)]
        if dist.get_rank() == 0:
            files = begin(written.of_all_ranks, self._going_on)
            stages.append((files, True))
            stages.append((begin(self._publish, draft, written, files), False))
        self._save = _Save(draft, written, stages)

    def _write(self, draft: Draft, written: WrittenFiles) -> None:
        """Write this rank's files."""
        entries = None
        try:
            entries = draft.write()
        finally:
            written.tell(entries)

    def _publish(self, draft: Draft, written: WrittenFiles, files: Future) -> None:
        """Publish the files of all ranks, unless one could not write its own and raises."""
        complete = False
        try:
            if (found := files.result()) is not None:
                draft.publish(found, self._keep_last)
                complete = True
        finally:
            written.tell_outcome(complete)

    def _going_on(self) -> bool:
        """Whether anybody waits for the checkpoint: the run has not let go of the folder."""
        return not self._saves.released

    def _least_progress(self, save: _Save) -> int:
        """Where the thread that is least far stands; one that has failed counts as that."""
        stages = [stage for stage, _ in save.stages]
        if any(stage.done() and stage.exception() is not None for stage in stages):
            stands = _FAILED
        else:
            stands = _ENDED if all(stage.done() for stage in stages) else _WRITING
        with self._waiting():
            least = torch.tensor([stands], device=self._engine.device)
            return int(all_reduce_(least, dist.group.WORLD, dist.ReduceOp.MIN))

    def _wait_for(self, save: _Save) -> None:
        """Wait for the thread of this rank."""
        for stage, waits in save.stages:
            # Not a phase that waits, while it writes: a rank whose disk hangs is the one at fault.
            with self._waiting() if waits else self._phases("writing checkpoint files"):
                concurrent.futures.wait([stage])

    def _waiting(self) -> Any:
        return self._phases("checkpoint", waits=dist.get_world_size() > 1)
