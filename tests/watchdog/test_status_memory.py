"""What a process wrote can be read after its death."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_eslm.watchdog.phases import PhaseStamp
from megatron_eslm.watchdog.status_memory import SharedStatus


def test_it_outlives_its_writer() -> None:
    told, tell = os.pipe()
    go_on, say_go_on = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = SharedStatus.create()
        os.write(tell, status.fd.to_bytes(4, "little"))
        os.read(go_on, 1)
        status.write(PhaseStamp(7, "a much longer name of a phase", False))
        status.write(PhaseStamp(12, "stage 1 forward", True))
        os.kill(os.getpid(), signal.SIGKILL)
    fd = int.from_bytes(os.read(told, 4), "little")
    status = SharedStatus.of(pid, fd)
    assert status.read() is None
    os.write(say_go_on, b"!")
    os.waitpid(pid, 0)
    assert status.read() == PhaseStamp(12, "stage 1 forward", True)
    with pytest.raises(OSError):
        SharedStatus.of(pid, fd)
    for end in (told, tell, go_on, say_go_on):
        os.close(end)


def test_a_long_name_is_cut() -> None:
    status = SharedStatus.create()
    status.write(PhaseStamp(2**40, "é" * 1000, False))
    found = status.read()
    assert found is not None and found.iteration == 2**40
    assert 200 < len(found.phase) < 260 and set(found.phase[:200]) == {"é"}


def test_another_file_is_no_blackboard(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("w") as file,
        pytest.raises(OSError, match="not a shared status"),
    ):
        SharedStatus.of(os.getpid(), file.fileno())
