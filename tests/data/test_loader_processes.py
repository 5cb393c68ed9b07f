"""Processes that make batches: what they hand over, and that none stays when something is wrong."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import SemLock
from pathlib import Path

import pytest

from megatron_eslm.data import loader_processes
from megatron_eslm.data.loader_processes import LoaderError, LoaderProcesses, RemoteTraceback
from megatron_eslm.errors import ConfigError

Make = Callable[[int], object]


def processes(
    make: Make, num: int = 20, *, workers: int = 2, timeout_seconds: float = 60.0
) -> LoaderProcesses:
    return LoaderProcesses(
        lambda numbers: make(numbers[0]),
        [[n, n + 100] for n in range(num)],
        workers=workers,
        timeout_seconds=timeout_seconds,
    )


def children() -> set[int]:
    """Processes that this one has forked, zombies included."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in text.split()}


@contextmanager
def nothing_left() -> Iterator[None]:
    before = children()
    yield
    assert children() == before


def pid_and_big(n: int) -> tuple[int, int, bytes]:
    """More than a pipe holds."""
    return n, os.getpid(), bytes(3 << 20)


def test_results_come_in_order_from_so_many_processes() -> None:
    for num, workers in ((7, 3), (2, 8), (0, 2), (5, 1)):
        with nothing_left():
            found = list(processes(pid_and_big, num, workers=workers))
        assert [n for n, _, _ in found] == list(range(num))
        assert all(len(big) == 3 << 20 for _, _, big in found)
        assert len({pid for _, pid, _ in found} - {os.getpid()}) == min(num, workers)


def test_what_is_dropped_in_the_middle_leaves_no_process() -> None:
    with nothing_left():
        batches = processes(pid_and_big)
        next(batches)
        del batches
    with nothing_left():
        processes(pid_and_big)


def test_no_shared_memory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /dev/shm is read-only or missing there are no semaphores."""

    def refuse(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(SemLock, "__init__", refuse)
    assert list(processes(lambda n: n, 3)) == [0, 1, 2]


class Odd(Exception):
    """It cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("odd")
        self.function = lambda: None


def test_an_error_comes_with_the_traceback_of_its_process() -> None:
    def make(n: int) -> int:
        if n == 3:
            raise KeyError("three")
        if n == 5:
            raise Odd
        return n

    with nothing_left():
        with pytest.raises(KeyError, match="three") as caught:
            list(processes(make))
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert 'raise KeyError("three")' in str(caught.value.__cause__)
        with pytest.raises(RuntimeError, match="Odd: odd"):
            list(processes(lambda n: make(n + 4)))


def end(how: signal.Signals | int) -> Make:
    def make(n: int) -> int:
        if n == 3:
            if isinstance(how, signal.Signals):
                faulthandler.disable()
                os.kill(os.getpid(), how)
            else:
                os._exit(how)
        return n

    return make


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGKILL, "was killed by SIGKILL. Most likely the machine ran out of memory; "),
        (signal.SIGBUS, "was killed by SIGBUS. A file of the data was cut short, or "),
        (signal.SIGUSR1, "was killed by SIGUSR1. The job ends; "),
        (3, "ended with exit code 3. The job ends; "),
    ],
)
def test_a_process_that_ends_is_named(how: signal.Signals | int, said: str) -> None:
    with nothing_left(), pytest.raises(LoaderError) as caught:
        list(processes(end(how)))
    assert f"which was to deliver samples 3 to 103, {said}" in str(caught.value)
    assert str(caught.value).startswith("loader process 2 of 2 (pid ")
    assert str(caught.value).endswith("start it again with --load to continue from the last "
                                      "checkpoint.")  # fmt: skip


@pytest.mark.timeout(60)
def test_killed_in_the_middle_of_handing_over() -> None:
    with nothing_left():
        batches = processes(pid_and_big, workers=1)
        _, pid, _ = next(batches)
        time.sleep(0.1)  # It fills the pipe meanwhile.
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LoaderError, match="samples 1 to 101, was killed by SIGKILL"):
            next(batches)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("big", [False, True])
def test_a_stopped_process_is_named_and_ended(big: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or while it hands over."""
    monkeypatch.setattr(loader_processes, "CHECK_SECONDS", 0.05)
    make: Make = pid_and_big if big else (lambda n: (n, os.getpid(), time.sleep(0.3)))
    with nothing_left():
        batches = processes(make, workers=1, timeout_seconds=0.6)
        _, pid, _ = next(batches)  # type: ignore[misc]
        time.sleep(0.1)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(LoaderError, match=rf"\(pid {pid}\).* has been stopped by a signal"):
            list(batches)


@pytest.mark.timeout(60)
def test_a_process_that_hangs_is_named_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_processes, "CHECK_SECONDS", 0.05)
    with (
        nothing_left(),
        pytest.raises(
            LoaderError,
            match=r"samples 0 to 100, has delivered nothing .*-timeout-minutes 0.005\)",
        ),
    ):
        list(processes(lambda n: time.sleep(1000), timeout_seconds=0.3))


def test_signals_to_the_whole_tree_do_not_end_them() -> None:
    batches = processes(lambda n: os.getpid(), workers=1)
    pid = next(batches)
    script = f"import os; [os.kill({pid}, n) for n in ({signal.SIGINT:d}, {signal.SIGTERM:d})]"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert list(batches) == [pid] * 19


def test_no_more_processes_than_the_system_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, calls = os.fork, iter(range(9))

    def fork_twice() -> int:
        if next(calls) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", fork_twice)
    with nothing_left(), pytest.raises(ConfigError) as caught:
        processes(pid_and_big, workers=4)
    assert str(caught.value) == (
        "--num-workers 4: the system can start only 2 loader processes here (Resource "
        "temporarily unavailable). Use fewer; 0 loads in the training process."
    )
