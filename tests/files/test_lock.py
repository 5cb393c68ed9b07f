import errno
import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.aside import aside_folder
from megatron_eslm.files.lock import FileLock

fork = multiprocessing.get_context("fork")


def _hold(path: Path, ready, child: bool = False) -> None:
    lock = FileLock(path)
    lock.take("x", "y")
    if child and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    ready.set()
    time.sleep(60)


def _holder(path: Path, **options):
    ready = fork.Event()
    process = fork.Process(target=_hold, args=(path, ready), kwargs=options)
    process.start()
    assert ready.wait(20)
    return process


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    first = _holder(path)
    lock = FileLock(path)
    with pytest.raises(ConfigError) as caught:
        lock.take("--save x", "Wait for it.")
    assert f"process {first.pid} on " in str(caught.value)
    assert str(caught.value).startswith("--save x is being written by")
    first.kill()
    first.join()
    with lock:  # killed: the kernel gave the lock back
        lock.take("--save x", "Wait for it.")
        with FileLock(path) as other:
            assert not other.acquire()
    assert not path.exists()


def test_waiting_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    first = _holder(path)
    os.kill(first.pid, signal.SIGKILL)
    assert FileLock(path).acquire(wait_seconds=20)
    first.join()


def test_a_forked_child_does_not_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    first = _holder(path, child=True)
    first.kill()
    first.join()
    with FileLock(path) as lock:
        assert lock.acquire(wait_seconds=5)


def test_a_lock_whose_file_is_removed_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    first, second = FileLock(path), FileLock(path)
    assert not first.held and first.acquire() and first.held
    path.unlink()
    assert not first.held and second.acquire()
    first.release()  # and leaves alone what is another's now
    assert second.held
    second.release()
    assert not path.exists()


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FileLock(tmp_path / "a.lock") as lock:
        assert lock.acquire() and not lock.excludes
    assert "no locks" in caplog.text


def _build(target: Path, ready) -> None:
    with aside_folder(target) as folder:
        (folder / "big").write_bytes(b"x")
        ready.set()
        time.sleep(60)


def test_an_aside_folder_outlives_nobody(tmp_path: Path) -> None:
    target = tmp_path / "data[1]"
    ready = fork.Event()
    builder = fork.Process(target=_build, args=(target, ready))
    builder.start()
    assert ready.wait(20)
    (theirs,) = (p for p in tmp_path.iterdir() if p.is_dir())
    with aside_folder(target) as ours:
        assert theirs.exists() and ours != theirs and ours.parent == target.parent
    assert not ours.exists()
    builder.kill()
    builder.join()
    with aside_folder(target):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == []
