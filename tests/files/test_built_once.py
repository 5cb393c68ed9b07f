import errno
import fcntl
import json
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.files import built_once as module
from megatron_eslm.files.built_once import RECORD, built_elsewhere, built_once

fork = multiprocessing.get_context("fork")
CONTENTS = {"a.bin": b"abc" * 1000, "inner/b": b"", "c": b"\0" * 10}


def build(folder: Path) -> None:
    for name, data in CONTENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def fail(folder: Path) -> None:
    raise AssertionError(f"{folder} is built a second time")


def holds_it(folder: Path) -> bool:
    return all((folder / name).read_bytes() == data for name, data in CONTENTS.items())


def test_builds_once_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "x[1]"
    built_once(folder, build)
    built_once(folder, fail)
    built_elsewhere(folder, "", wait_seconds=0)
    (folder / "added later").write_bytes(b"1")
    built_once(folder, fail)
    assert holds_it(folder) and os.listdir(folder.parent) == ["x[1]"]


def _zeros(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1700] ^= 1
    path.write_bytes(data)


def _become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "a.bin").write_bytes(b""), "a.bin is damaged: it has 0 bytes instead"),
        (lambda f: _zeros(f / "a.bin"), "a.bin is damaged: its contents have changed"),
        (lambda f: _flip(f / "a.bin"), "a.bin is damaged: its contents have changed"),
        (lambda f: (f / "inner/b").unlink(), "inner/b is missing"),
        (lambda f: _become_a_pipe(f / "c"), "is a named pipe"),
        (lambda f: (f / RECORD).write_bytes(b""), "built.json is not JSON"),
        (lambda f: (f / RECORD).write_text("[" * 100_000), "nested too deep"),
        (lambda f: (f / RECORD).write_text('{"key": "", "files": {"c": 5}}'), "files.c"),
    ],
)
def test_what_is_damaged_is_built_again(tmp_path: Path, caplog, damage, says: str) -> None:
    folder = tmp_path / "x"
    built_once(folder, build)
    with (folder / "a.bin").open("rb") as reader:
        damage(folder)
        seen = reader.read()
        with pytest.raises(ConfigError, match=f"{says}.* though another .* Do that"):
            built_elsewhere(folder, "Do that.", wait_seconds=0)
        with caplog.at_level(logging.INFO):
            built_once(folder, build)
        reader.seek(0)
        assert reader.read() == seen  # nothing changes under those who have it open
    assert holds_it(folder)
    assert len(caplog.records) == 1 and says in caplog.text and "building it again" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["x", "x.replaced"]
    damage(folder)
    built_once(folder, build)
    assert holds_it(folder) and sorted(os.listdir(tmp_path)) == ["x", "x.replaced"]


def test_what_has_no_record_or_another_key_is_built_again(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    built_once(folder, build, key="1")
    assert holds_it(folder) and not caplog.records
    built_once(folder, build, key="2")
    assert holds_it(folder) and "was built from something else (1, not 2)" in caplog.text
    built_once(folder, fail, key="2")


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def no_room(folder: Path) -> None:
        build(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        built_once(tmp_path / "x", no_room)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(os, "fsync", lambda file: no_room(tmp_path))
    with pytest.raises(OSError, match="No space"):
        built_once(tmp_path / "y" / "x", build)
    assert os.listdir(tmp_path / "y") == []


def _slowly(folder: Path) -> None:
    build(folder)
    time.sleep(0.05)


def _job(folder: Path, start, results, locks: bool) -> None:
    if not locks:
        fcntl.flock = _refuse
    start.wait()
    try:
        built_once(folder, _slowly)
        results.put(holds_it(folder))
    except BaseException as error:
        results.put(repr(error))


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("locks", [True, False])
def test_any_number_of_jobs_at_once(tmp_path: Path, locks: bool) -> None:
    for round_number in range(4):
        folder = tmp_path / "x"
        if round_number % 2:
            _flip(folder / "a.bin")  # all of them find it damaged
        start, results = fork.Barrier(4), fork.Queue()
        jobs = [fork.Process(target=_job, args=(folder, start, results, locks)) for _ in range(4)]
        for job in jobs:
            job.start()
        assert [results.get(timeout=60) for _ in jobs] == [True] * 4
        for job in jobs:
            job.join()
        assert set(os.listdir(tmp_path)) <= {"x", "x.replaced"}


def test_a_folder_that_another_machine_published_first_is_used(tmp_path, monkeypatch) -> None:
    """Also where its name is seen only after the rename has failed."""
    folder, unseen = tmp_path / "x", ["x"]
    exists = Path.exists
    monkeypatch.setattr(module, "_take_turn", lambda *_: None)  # no locks between machines

    def seen(path: Path) -> bool:
        if path.name in unseen and exists(path):
            unseen.remove(path.name)
            return False
        return exists(path)

    def build_after_another(aside: Path) -> None:
        built_once(folder, build)
        (aside / "ours").touch()
        monkeypatch.setattr(Path, "exists", seen)

    built_once(folder, build_after_another)
    assert unseen == [] and holds_it(folder) and not (folder / "ours").exists()
    assert os.listdir(tmp_path) == ["x"]


def _for_ever(folder: Path, ready) -> None:
    def stop(aside: Path) -> None:
        build(aside)
        ready.set()
        time.sleep(60)

    built_once(folder, stop)


def test_a_killed_builder_leaves_nothing_and_a_stuck_one_stops_nobody(
    tmp_path: Path, caplog
) -> None:
    ready = [fork.Event(), fork.Event()]
    first, second = (
        fork.Process(target=_for_ever, args=(tmp_path / name, event))
        for name, event in zip("xy", ready, strict=True)
    )
    first.start()
    second.start()
    assert all(event.wait(20) for event in ready)
    with caplog.at_level(logging.INFO):
        built_once(tmp_path / "x", build, patience_seconds=0.2)
    assert f"waiting for process {first.pid} on" in caplog.text and holds_it(tmp_path / "x")
    for process in (first, second):
        process.kill()
        process.join()
    built_once(tmp_path / "z", build)  # `y` is never built again
    assert sorted(os.listdir(tmp_path)) == ["x", "z"]


def test_late_names_are_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "x"

    def appear() -> None:
        time.sleep(0.1)
        built_once(folder, build)

    thread = threading.Thread(target=appear)
    thread.start()
    built_elsewhere(folder, "", wait_seconds=20)
    thread.join()
    _flip(folder / "a.bin")
    built_elsewhere(folder, "", contents=False, wait_seconds=0)
    with pytest.raises(ConfigError, match=r"y is not there, though another .* Share it"):
        built_elsewhere(tmp_path / "y", "Share it.", wait_seconds=0)


def test_a_lock_of_another_user_is_no_obstacle(tmp_path: Path, monkeypatch) -> None:
    def deny(self) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.FileLock, "acquire", lambda self, **_: deny(self))
    monkeypatch.setattr(module, "aside_folder", _plain_aside(tmp_path))
    built_once(tmp_path / "x", build)
    assert holds_it(tmp_path / "x")


def _plain_aside(parent: Path):
    import contextlib

    @contextlib.contextmanager
    def aside(folder: Path):
        (parent / "aside").mkdir()
        yield parent / "aside"

    return aside


def test_the_record_names_every_file(tmp_path: Path) -> None:
    built_once(tmp_path / "x", build, key="k")
    record = json.loads((tmp_path / "x" / RECORD).read_text())
    assert record["key"] == "k" and sorted(record["files"]) == sorted(CONTENTS)
    assert record["files"]["a.bin"]["bytes"] == 3000
