"""The folder of --save: one writer, checkpoints whole or absent, and what fails behind that."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from megatron_eslm.checkpoint import save_folder
from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.manifest import list_checkpoints
from megatron_eslm.checkpoint.save_folder import SaveFolder
from megatron_eslm.errors import ConfigError
from megatron_eslm.files import durable

from .forging import tiny

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_folder, "WAIT_SECONDS", 0.3)


def names(save: Path) -> list[str]:
    return [path.name for path in list_checkpoints(save)]


def leftovers(save: Path) -> list[str]:
    return [path.name for path in save.glob(".*")]


def test_another_runs_folder_is_left_alone(tmp_path: Path) -> None:
    save = tmp_path / "run"
    tiny(save, 2)
    tiny(save, 4)
    (save / ".saving-iter_0000006").mkdir()
    for load in (None, tmp_path, tmp_path / "other"):
        with pytest.raises(ConfigError) as caught:
            SaveFolder(save).take(load)
        text = str(caught.value)
        assert f"--save {save} already holds checkpoints" in text and f"--load {save}" in text
        assert leftovers(save) == [".saving-iter_0000006"]
    for load in (save, save / "iter_0000002"):
        saves = SaveFolder(save)
        saves.take(load)
        assert leftovers(save) == [".lock"]
        saves.release()
        assert leftovers(save) == []


def test_nowhere_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--save .*file/run: Not a directory"):
        SaveFolder(tmp_path / "file" / "run").take(None)
    for number in (errno.ENOSPC, errno.EACCES):

        def refuse(path: Path, content: bytes, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_bytes", refuse)
        with pytest.raises(ConfigError, match=f"--save .*run: {os.strerror(number)}"):
            SaveFolder(tmp_path / "run").take(None)


def _hold(save: Path, ready, seconds: float) -> None:
    saves = SaveFolder(save)
    saves.take(save)
    saves.begin(6)
    ready.set()
    time.sleep(seconds)


def _job(save: Path, seconds: float = 60.0):
    ready = fork.Event()
    process = fork.Process(target=_hold, args=(save, ready, seconds))
    process.start()
    assert ready.wait(20)
    return process


def test_a_second_job_is_refused_by_name_and_touches_nothing(tmp_path: Path, caplog) -> None:
    save = tmp_path / "run"
    tiny(save, 4)
    first = _job(save)
    before = sorted(leftovers(save))
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError) as caught:
        SaveFolder(save).take(save)
    assert f"--save {save} is being written by process {first.pid} on " in str(caught.value)
    assert "waiting up to 0.3 seconds for it to end" in caplog.text
    assert sorted(leftovers(save)) == before and len(before) == 2  # the lock and the draft
    first.kill()
    first.join()
    saves = SaveFolder(save)
    saves.take(save)  # killed: nothing of it is in the way
    assert leftovers(save) == [".lock"]
    saves.release()


def test_a_requeued_job_waits_for_the_one_before(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(save_folder, "WAIT_SECONDS", 20.0)
    save = tmp_path / "run"
    tiny(save, 4)
    first = _job(save, seconds=0.5)
    saves = SaveFolder(save)
    saves.take(save)
    saves.release()
    first.join()


def test_two_drafts_of_one_step_never_meet(tmp_path: Path) -> None:
    """On a file system without locks two jobs can be at it."""
    ours, theirs = SaveFolder(tmp_path), SaveFolder(tmp_path)
    for saves in (ours, theirs):
        saves._lock.excludes = False
        saves._take_lock = lambda: None  # type: ignore[method-assign]
    assert ours.begin(2) != theirs.begin(2)
    assert len(leftovers(tmp_path)) == 2


def test_a_folder_that_is_removed_in_mid_run_is_made_and_taken_again(tmp_path: Path) -> None:
    save = tmp_path / "run"
    saves = SaveFolder(save)
    saves.take(None)
    shutil.rmtree(save)
    assert saves.begin(1).is_dir() and saves._lock.held
    shutil.rmtree(save)
    other = SaveFolder(save)
    other.take(None)
    with pytest.raises(ConfigError, match="is being written by process"):
        saves.begin(2)
    saves.release()
    assert other._lock.held
    other.release()


def refuse(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_what_fails_behind_publication_is_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    save = tmp_path / "run"
    tiny(save, 1)
    monkeypatch.setattr(save_folder, "write_whole", refuse(errno.EIO))
    folder = tiny(save, 2)
    assert find_checkpoint(save).folder == folder
    (record,) = caplog.records
    assert f"{folder} is saved, but `latest` beside it could not be updated" in record.message
    assert (save / "latest").read_text() == "iter_0000001\n"


def test_a_folder_that_cannot_be_synced_does_not_matter(tmp_path: Path, monkeypatch) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(file)

    monkeypatch.setattr(durable, "_warned", False)
    monkeypatch.setattr(os, "fsync", fsync)
    assert find_checkpoint(tiny(tmp_path / "run", 1).parent).state().iteration == 1


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOTEMPTY])
@pytest.mark.parametrize("what", ["rename", "rmtree", "iterdir"])
def test_the_oldest_that_cannot_be_removed_waits_for_the_next_time(
    tmp_path: Path, monkeypatch, caplog, number: int, what: str
) -> None:
    save = tmp_path / "run"
    for iteration in (1, 2):
        tiny(save, iteration)
    newest = tiny(save, 3)
    saves = SaveFolder(save)
    with monkeypatch.context() as patch:
        if what == "rename":
            patch.setattr(SaveFolder, "_rename_away", refuse(number))
        elif what == "rmtree":
            patch.setattr(shutil, "rmtree", refuse(number))
        else:
            patch.setattr(Path, "iterdir", refuse(number))
        saves.prune(newest, keep_last=2)
    listed = what != "iterdir"
    assert ("iter_0000001" if listed else "old checkpoints") + " could not be" in caplog.text
    assert "the next save will try again" in caplog.text
    saves.take(save)
    draft = saves.begin(4)
    assert leftovers(save).count(draft.name) == 1 and len(leftovers(save)) == 2
    saves.prune(newest, keep_last=2)
    assert names(save) == ["iter_0000003", "iter_0000002"]
    saves.release()


def test_a_step_saved_again_takes_the_place_of_the_one_before(tmp_path: Path, monkeypatch) -> None:
    save = tmp_path / "run"
    folder = tiny(save, 2)
    tiny(save, 2, value=0.25)
    assert names(save) == ["iter_0000002"] and not leftovers(save)
    before = find_checkpoint(save).manifest
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.startswith(".saving-"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        tiny(save, 2, value=0.125)
    assert find_checkpoint(save).manifest == before and folder.is_dir()


def test_a_newer_one_that_is_none_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """A renamed checkpoint is never the newest: a run goes on behind the true one, again and
    again, and writes over the false one when it gets there."""
    save = tmp_path / "run"
    tiny(save, 5).rename(save / "iter_0000009")
    for iteration in (6, 7, 8):
        newest = tiny(save, iteration)
        SaveFolder(save).prune(newest, keep_last=2)
        assert find_checkpoint(save).state().iteration == iteration
    assert names(save) == ["iter_0000009", "iter_0000008", "iter_0000007"]
    tiny(save, 9)
    assert find_checkpoint(save).state().iteration == 9
