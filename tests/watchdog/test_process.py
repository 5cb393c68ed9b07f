"""What the kernel says of a process of the same machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_eslm.watchdog.process import Process, State


@pytest.fixture
def child() -> Iterator[Process]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, Process.this().started.to_bytes(8, "little"))
        signal.pause()
        os._exit(0)
    started = int.from_bytes(os.read(reader, 8), "little")
    os.close(reader)
    os.close(writer)
    yield replace(Process.this(), pid=pid, started=started)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def becomes(process: Process, state: State) -> bool:
    deadline = time.monotonic() + 10
    while process.state() != state and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.state() == state


def test_states(child: Process) -> None:
    assert Process.this().state() == "runs"
    assert child.state() == "runs"
    os.kill(child.pid, signal.SIGSTOP)
    assert becomes(child, "stopped")
    os.kill(child.pid, signal.SIGCONT)
    assert becomes(child, "runs")
    os.kill(child.pid, signal.SIGSTOP)
    child.kill()
    # A zombie, as long as the fixture has not asked for its exit code.
    assert becomes(child, "gone")
    assert os.path.exists(f"/proc/{child.pid}")


def test_another_process_with_the_same_number_is_not_the_same(child: Process) -> None:
    earlier = replace(child, started=child.started - 1)
    assert earlier.state() == "gone"
    earlier.kill()
    time.sleep(0.05)
    assert child.state() == "runs"


def test_processes_of_one_machine_have_one_place() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, Process.this().namespace.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 1000).decode() == Process.this().namespace
    os.close(reader)
    os.close(writer)


def test_a_name_with_spaces_and_parentheses_is_no_hindrance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "7 (a) Z (b) T 1 " + " ".join(str(n) for n in range(5, 53))
    monkeypatch.setattr("pathlib.Path.read_text", lambda *a, **k: text)
    process = Process(host="h", pid=7, namespace="p", started=22)
    assert process.state() == "stopped"
