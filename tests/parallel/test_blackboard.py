"""What a process wrote can be read after its death."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_eslm.watchdog.phases import Moment
from megatron_eslm.watchdog.status_memory import Blackboard


def test_it_outlives_its_writer() -> None:
    told, tell = os.pipe()
    go_on, say_go_on = os.pipe()
    pid = os.fork()
    if pid == 0:
        board = Blackboard.create()
        os.write(tell, board.fd.to_bytes(4, "little"))
        os.read(go_on, 1)
        board.write(Moment(7, "a much longer name of a phase", False))
        board.write(Moment(12, "stage 1 forward", True))
        os.kill(os.getpid(), signal.SIGKILL)
    fd = int.from_bytes(os.read(told, 4), "little")
    board = Blackboard.of(pid, fd)
    assert board.read() is None
    os.write(say_go_on, b"!")
    os.waitpid(pid, 0)
    assert board.read() == Moment(12, "stage 1 forward", True)
    with pytest.raises(OSError):
        Blackboard.of(pid, fd)
    for end in (told, tell, go_on, say_go_on):
        os.close(end)


def test_a_long_name_is_cut() -> None:
    board = Blackboard.create()
    board.write(Moment(2**40, "é" * 1000, False))
    found = board.read()
    assert found is not None and found.iteration == 2**40
    assert 200 < len(found.phase) < 260 and set(found.phase[:200]) == {"é"}


def test_another_file_is_no_blackboard(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(OSError, match="is no blackboard"):
        Blackboard.of(os.getpid(), file.fileno())
