"""The folder of `--save`: one writer at a time, checkpoints published atomically."""

from __future__ import annotations

import logging
import shutil
import threading
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
"""How long a requeued job waits for its predecessor to end."""
_LOCK = ".lock"
_SAVING, _REMOVING = ".saving-", ".removing-"
_LEFTOVERS = (f"{_SAVING}*", f"{_REMOVING}*", ".latest.*")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError in the block into a ConfigError that names the folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--save {folder}: {error.strerror or error}. The checkpoint was not written; earlier "
            "ones are untouched."
        ) from error


class SaveFolder:
    """A folder of checkpoints, locked by this process from `take` to `release`.

        saves = SaveFolder("runs/small")
        saves.take(load=None)
        draft = saves.begin(100)
        ...                                   # write files into it
        saves.publish(draft, manifest)        # iter_0000100 now exists
        saves.prune(checkpoint, keep_last=2)
        saves.release()

    In a job of several ranks, only rank 0 does this. `publish` may run in another thread: `release`
    waits for it, and nothing is published afterwards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path / _LOCK)
        self._publishing = threading.Lock()
        self._taken = self._released = False

    def take(self, load: str | Path | None) -> None:
        """Lock the folder and make sure that checkpoints can be written.

        Waits a few seconds for another job that is about to end. Removes leftovers of killed jobs.

        Args:
            load: the folder of checkpoints, or the checkpoint, that the run continues.

        Raises:
            ConfigError: no permission or space, another job writes here, or the folder has
                checkpoints of another run.
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
        """Unlock the folder."""
        with self._publishing:
            self._taken, self._released = False, True
            self._lock.release()

    @property
    def released(self) -> bool:
        """Whether `release` has been called; nothing is published or removed any more."""
        return self._released

    def begin(self, iteration: int) -> Path:
        """Create an empty draft folder for a checkpoint.

        Its name is unique, so that even on a file system without locks two jobs never write into
        the same draft.
        """
        if not self._lock.held:  # the folder was removed during the run, with the lock
            self._lock.release()
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        self._clean()
        draft = self._aside(_SAVING, checkpoint_name(iteration))
        draft.mkdir()
        return draft

    def discard(self, draft: Path) -> None:
        """Remove a failed draft, which may itself be filling the disk."""
        shutil.rmtree(draft, ignore_errors=True)

    def publish(self, draft: Path, manifest: Manifest) -> Path:
        """Write the manifest and rename the draft, which makes it a checkpoint.

        Failures after the rename are only warnings: the checkpoint is complete, and the run must
        not end because `latest` could not be updated.

        Raises:
            OSError: the checkpoint could not be published.
        """
        with self._publishing:
            if not self._taken:
                raise OSError("the folder has been unlocked, so others may write there")
            return self._publish(draft, manifest)

    def _publish(self, draft: Path, manifest: Manifest) -> Path:
        folder = self.path / checkpoint_name(manifest.iteration)
        (draft / MANIFEST).write_bytes(encode(manifest))
        sync_file(draft / MANIFEST)
        for inner in draft.rglob("*"):
            if inner.is_dir():
                sync_folder(inner)
        sync_folder(draft)
        # The same step is saved again after going back to an earlier one.
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
                "%s is saved, but `latest` beside it could not be updated: %s", folder, error
            )
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return folder

    def prune(self, newest: Path, keep_last: int) -> None:
        """Remove old checkpoints; the next save retries those that cannot be removed.

        Args:
            newest: the checkpoint just saved. It and later ones are kept; a run that went back to
                an earlier step may have newer or damaged ones beside it.
            keep_last: number of checkpoints to keep up to `newest`; 0 keeps all.
        """
        if not keep_last:
            return
        with self._publishing:
            if not self._released:  # else another job may have the folder
                self._prune(newest, keep_last)

    def _prune(self, newest: Path, keep_last: int) -> None:
        try:
            saved = list_checkpoints(self.path)
        except OSError as error:
            # The newest is saved: what else is there must not end the run.
            logger.warning(
                "%s: old checkpoints could not be listed (%s); the next save will try again",
                self.path,
                error,
            )
            return
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
        self._taken = True

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
        """Rename a checkpoint before removal, so that a kill leaves nothing that looks like one."""
        return folder.rename(self._aside(_REMOVING, folder.name))

    def _clean(self) -> None:
        """Remove leftover drafts and removals, which nobody else uses while we hold the lock."""
        if not self._lock.excludes:
            return
        with suppress(OSError):  # try again next time
            for leftover in [path for glob in _LEFTOVERS for path in self.path.glob(glob)]:
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
