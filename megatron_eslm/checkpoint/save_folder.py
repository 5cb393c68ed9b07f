"""The folder of `--save`: one job writes there at a time, and checkpoints appear in it whole."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_eslm.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    checkpoint_name,
    encode,
    list_checkpoints,
)
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.durable import sync_file, sync_folder, write_whole
from megatron_eslm.files.lock import FileLock

logger = logging.getLogger(__name__)

WAIT_SECONDS = 10.0
"""How long a job waits for its predecessor to end, as one that is requeued has to."""
_LOCK = ".lock"
_SAVING, _REMOVING = ".saving-", ".removing-"
_LEFTOVERS = (f"{_SAVING}*", f"{_REMOVING}*", ".latest.*")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What the disk refuses in the block ends the run by name."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--save {folder}: {error.strerror or error}. The checkpoint was not written; earlier "
            "ones are untouched."
        ) from error


class SaveFolder:
    """A folder of checkpoints, which belongs to this process from `take` to `release`.

        saves = SaveFolder("runs/small")
        saves.take(load=None)
        draft = saves.begin(100)
        ...                                   # write files into it
        saves.publish(draft, manifest)        # iter_0000100 is there
        saves.prune(checkpoint, keep_last=2)
        saves.release()

    In a job of several ranks it is rank 0 that does all this.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path / _LOCK)

    def take(self, load: str | Path | None) -> None:
        """Make sure that checkpoints can be written here, and that nobody else does.

        Waits a few seconds for another job that is about to end. What killed jobs left is removed.

        Args:
            load: the folder of checkpoints, or the checkpoint, that the run continues.

        Raises:
            ConfigError: no permission or room, another job writes here, or another run's
                checkpoints are here.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            with disk_errors(self.path):
                probe = self.path / ".write-probe"
                probe.write_bytes(b"\0" * 4096)
                probe.unlink()
            self._check_continues(load)
            self._clean()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others write here."""
        self._lock.release()

    def begin(self, iteration: int) -> Path:
        """A fresh folder to write a checkpoint into.

        Its name is nobody else's: even on a file system without locks, the files of two jobs
        never meet in it.
        """
        if not self._lock.held:  # the folder was removed in mid-run, and the lock with it
            self._lock.release()
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        self._clean()
        draft = self._aside(_SAVING, checkpoint_name(iteration))
        draft.mkdir()
        return draft

    def discard(self, draft: Path) -> None:
        """Remove a draft that came to nothing: on a full disk it is most of what fills it."""
        shutil.rmtree(draft, ignore_errors=True)

    def publish(self, draft: Path, manifest: Manifest) -> Path:
        """Give a draft its manifest and its name: from the rename on the checkpoint exists.

        What fails behind that is a warning. The checkpoint is whole, and a run must not end
        because a file that tells of it could not be updated.

        Raises:
            OSError: the checkpoint could not be published.
        """
        folder = self.path / checkpoint_name(manifest.iteration)
        (draft / MANIFEST).write_bytes(encode(manifest))
        sync_file(draft / MANIFEST)
        for inner in draft.rglob("*"):
            if inner.is_dir():
                sync_folder(inner)
        sync_folder(draft)
        # The same step saved again, after going back to an earlier one.
        before = self._rename_away(folder) if folder.exists() else None
        try:
            draft.rename(folder)
        except OSError:
            if before is not None:
                before.rename(folder)
            raise
        try:
            sync_folder(self.path)
            write_whole(self.path / "latest", f"{folder.name}\n".encode())
        except OSError as error:
            logger.warning(
                "%s is saved; `latest` beside it could not be updated: %s", folder, error
            )
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return folder

    def prune(self, newest: Path, keep_last: int) -> None:
        """Remove all but the last checkpoints; one that cannot be removed waits for the next time.

        Args:
            newest: what was just saved. It stays, although a run that went back to an earlier
                step has newer ones beside it, or damaged ones.
            keep_last: how many stay, with that one; 0 keeps all.
        """
        if not keep_last:
            return
        saved = list_checkpoints(self.path)
        older = saved[saved.index(newest) + 1 :] if newest in saved else []
        for old in older[keep_last - 1 :]:
            try:
                shutil.rmtree(self._rename_away(old))
            except OSError as error:
                logger.warning(
                    "%s could not be removed (%s); the next save will try again", old, error
                )

    def _take_lock(self) -> None:
        self._lock.take(
            f"--save {self.path}",
            "Wait for that job to end or stop it, or save to another folder.",
            wait_seconds=WAIT_SECONDS,
        )

    def _check_continues(self, load: str | Path | None) -> None:
        there = list_checkpoints(self.path)
        ours = {self.path.resolve(), *(path.resolve() for path in there)}
        if there and (load is None or Path(load).resolve() not in ours):
            raise ConfigError(
                f"--save {self.path} already holds checkpoints of a run. Continue that run with "
                f"--load {self.path}, or save to another folder."
            )

    def _aside(self, prefix: str, name: str) -> Path:
        return self.path / f"{prefix}{name}-{uuid.uuid4().hex[:12]}"

    def _rename_away(self, folder: Path) -> Path:
        """Take a checkpoint's name from it, so that a kill leaves nothing that looks like one."""
        return folder.rename(self._aside(_REMOVING, folder.name))

    def _clean(self) -> None:
        """Remove what is left of drafts and removals: while we hold the lock nobody needs it."""
        if not self._lock.excludes:
            return
        with suppress(OSError):  # what cannot be removed now can wait
            for leftover in [path for glob in _LEFTOVERS for path in self.path.glob(glob)]:
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
