"""Ranks that do nothing but hold a watchdog, and what becomes of them when one is killed."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from megatron_eslm.parallel.meeting import Meeting
from megatron_eslm.watchdog.heartbeat import HOW_TO_GO_ON, Diagnosis
from megatron_eslm.watchdog.phases import Phases
from megatron_eslm.watchdog.process import Process
from megatron_eslm.watchdog.stopwatch import Stopwatch
from megatron_eslm.watchdog.watchdog import SILENCE_SECONDS, Watchdog, job_watchdog

Work = Callable[[int, Phases, Watchdog], None]


class Job:
    """Forked ranks over a store on loopback, with one log.

    The store is kept by rank 0, as under the deepspeed launcher, or by a process of its own, as
    under torchrun.
    """

    def __init__(
        self,
        folder: Path,
        world_size: int,
        work: Work,
        *,
        timeout_seconds: float = 30.0,
        rank_zero_keeps_store: bool = True,
        places: str = "",
    ) -> None:
        """`places`: a letter for each rank; those with the same letter see each other."""
        self.log_file = folder / "log"
        self._log = os.open(self.log_file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self._world_size, self._work, self._timeout_seconds = world_size, work, timeout_seconds
        self._rank_zero_keeps, self._places = rank_zero_keeps_store, places or "a" * world_size
        self._ready = folder / "ready"
        self._ready.mkdir()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        self._listener, self._port = listener, listener.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.keeper = None if rank_zero_keeps_store else self._fork(self._keep)
        self.pids = [self._fork(self._rank, rank) for rank in range(world_size)]
        listener.close()
        os.close(self._log)
        self._wait_for(lambda: len(list(self._ready.iterdir())) == world_size)

    def _fork(self, run: Callable[..., None], *args: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.dup2(self._log, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        try:
            run(*args)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(70)
        os._exit(0)

    def _store(self, *, keeps: bool) -> dist.TCPStore:
        fd = self._listener.detach() if keeps else None
        if not keeps:
            self._listener.close()
        return dist.TCPStore(
            "127.0.0.1",
            self._port,
            is_master=keeps,
            master_listen_fd=fd,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
        )

    def _keep(self) -> NoReturn:
        store = self._store(keeps=True)
        while store:
            signal.pause()
        raise AssertionError

    def _rank(self, rank: int) -> None:
        store = self._store(keeps=self._rank_zero_keeps and rank == 0)
        process, phases = Process.this(), Phases()
        watchdog = Watchdog(
            phases,
            rank=rank,
            world_size=self._world_size,
            store=store,
            timeout_seconds=self._timeout_seconds,
            rank_zero_keeps_store=self._rank_zero_keeps,
            process=replace(process, namespace=process.namespace + self._places[rank]),
        )
        watchdog.start()
        client = watchdog._client
        wait_until(lambda: client.neighbours is not None)
        (self._ready / str(rank)).touch()
        self._work(rank, phases, watchdog)

    def signal(self, rank: int, number: signal.Signals) -> None:
        # Beats of where the ranks are have arrived by then.
        time.sleep(0.6)
        os.kill(self.pids[rank], number)

    def _wait_for(self, done: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            self._reap()
            assert time.monotonic() < deadline, (self.codes, self.log())
            time.sleep(0.05)

    def _reap(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)

    def end(self) -> list[int]:
        """Exit codes (-9: killed) once all ranks have ended, which they have to do."""
        self._wait_for(lambda: len(self.codes) == self._world_size)
        return [self.codes[rank] for rank in range(self._world_size)]

    def log(self) -> str:
        return self.log_file.read_text()

    def errors(self) -> list[str]:
        return [line for line in self.log().splitlines() if line.startswith("error: ")]

    def close(self) -> None:
        left = [pid for rank, pid in enumerate(self.pids) if rank not in self.codes]
        for pid in [*left, *([self.keeper] if self.keeper else [])]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    jobs: list[Job] = []

    def start_one(*args: object, **kwargs: object) -> Job:
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        jobs.append(Job(folder, *args, **kwargs))  # type: ignore[arg-type]
        return jobs[-1]

    yield start_one
    for job in jobs:
        job.close()


def wait_until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.02)


def wait_in_phase(rank: int, phases: Phases, watchdog: Watchdog) -> None:
    """As the main thread of a rank does that waits for the others."""
    phases.iteration = 12
    with phases(f"stage {rank} forward", waits=rank != 1):
        time.sleep(1000)


def who(job: Job, rank: int) -> str:
    return f"error: rank {rank} (host {socket.gethostname()}, pid {job.pids[rank]})"


def test_a_killed_rank_is_named_once(start: Start) -> None:
    jobs = [
        (victim, start(3, wait_in_phase, rank_zero_keeps_store=keeps))
        for victim in range(3)
        for keeps in (True, False)
    ]
    for victim, job in jobs:
        job.signal(victim, signal.SIGKILL)
    for victim, job in jobs:
        assert job.end() == [-9 if rank == victim else 1 for rank in range(3)]
        assert job.errors() == [
            f'{who(job, victim)} died in "stage {victim} forward" of iteration 12. {HOW_TO_GO_ON}'
        ], job.log()


def test_the_phase_of_a_death_is_exact(start: Start) -> None:
    """Not that of the last heartbeat."""

    def work(rank: int, phases: Phases, watchdog: Watchdog) -> None:
        phases.iteration = 3
        time.sleep(1.0)
        if rank == 0:
            phases.iteration = 4
            with phases("stage 0 forward"):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)

    job = start(2, work)
    assert job.end() == [-9, 1]
    assert job.errors() == [
        f'{who(job, 0)} died in "stage 0 forward" of iteration 4. {HOW_TO_GO_ON}'
    ]


def test_a_stopped_rank_is_named_and_ended(start: Start) -> None:
    """Stopped, rank 0 keeps everyone waiting who asks its store."""
    jobs = [start(3, wait_in_phase, timeout_seconds=4.0) for _ in range(2)]
    for victim, job in enumerate(jobs):
        job.signal(victim, signal.SIGSTOP)
    for victim, job in enumerate(jobs):
        assert job.end() == [-9 if rank == victim else 1 for rank in range(3)]
        assert job.errors() == [
            f"{who(job, victim)} has not answered for 2 s, stopped by a signal; last seen in "
            f'"stage {victim} forward" of iteration 12. {HOW_TO_GO_ON}'
        ], job.log()


def test_a_rank_that_does_not_go_on_is_named(start: Start) -> None:
    job = start(3, wait_in_phase, timeout_seconds=3.0)
    assert job.end() == [1, 1, 1]
    (error,) = job.errors()
    begin = f'{who(job, 1)} has been in "stage 1 forward" of iteration 12 for '
    end = (
        ' s, and no rank went on (--distributed-timeout-minutes 0.05); rank 0 waiting in "stage 0 '
        'forward" of iteration 12, rank 2 waiting in "stage 2 forward" of iteration 12. '
        + HOW_TO_GO_ON
    )
    assert error.startswith(begin) and error.endswith(end)
    assert 3 <= int(error[len(begin) : -len(end)]) < 10


def test_a_host_that_is_gone_is_found_by_its_silence(start: Start) -> None:
    """Nobody who is left can see its processes."""
    job = start(4, wait_in_phase, timeout_seconds=4.0, places="aabb")
    job.signal(2, signal.SIGKILL)
    os.kill(job.pids[3], signal.SIGKILL)
    assert job.end() == [1, 1, -9, -9]
    (error,) = job.errors()
    assert re.fullmatch(
        re.escape(who(job, 2)) + r" has not answered for [2-4] s, nor has any other rank of its "
        r'host \(ranks 2-3\); last seen in "stage 2 forward" of iteration 12\. .*',
        error,
    )


def test_a_lost_store_ends_the_job(start: Start) -> None:
    job = start(2, wait_in_phase, rank_zero_keeps_store=False)
    assert job.keeper is not None
    os.kill(job.keeper, signal.SIGKILL)
    assert job.end() == [1, 1]
    (error,) = job.errors()
    assert re.fullmatch(
        r"error: the connection to the launcher, which keeps the job's store, is lost \(.+\)\. "
        + re.escape(HOW_TO_GO_ON),
        error,
    )


def test_a_store_that_is_silent_ends_the_job(start: Start) -> None:
    """Its host is not one of those that are watched."""
    job = start(2, wait_in_phase, rank_zero_keeps_store=False, timeout_seconds=4.0)
    assert job.keeper is not None
    os.kill(job.keeper, signal.SIGSTOP)
    assert job.end() == [1, 1]
    (error,) = job.errors()
    assert "which keeps the job's store, has not answered for 2 s. " in error


def test_an_error_of_one_rank_is_told_by_that_rank(start: Start) -> None:
    """The others find their connections closed, or find nothing at all."""

    def work(rank: int, phases: Phases, watchdog: Watchdog) -> None:
        phases.iteration = 3
        if rank == 1:
            with phases("optimizer"):
                try:
                    raise OSError("No space left\non device")
                except OSError as error:
                    watchdog.fail_with(error)
        if rank == 2:
            watchdog.fail_with(RuntimeError("[pair.cc:1] Connection closed by peer [127.0.0.1]:1"))
        time.sleep(1000)

    job = start(3, work)
    assert job.end() == [1, 1, 1]
    log = job.log()
    assert log.startswith("Traceback (most recent call last):\n")
    assert log.endswith(
        f'device\n{who(job, 1)} failed in "optimizer" of iteration 3: OSError: No space left. '
        f"{HOW_TO_GO_ON}\n"
    )
    assert log.count("Traceback") == log.count("error: ") == 1


def test_a_closed_connection_is_told_as_the_death_behind_it(start: Start) -> None:
    def work(rank: int, phases: Phases, watchdog: Watchdog) -> None:
        phases.iteration = 3
        if rank == 1:
            time.sleep(1000)
        time.sleep(0.5)
        watchdog.fail_with(RuntimeError("[pair.cc:1] Connection closed by peer [127.0.0.1]:1"))

    job = start(3, work)
    job.signal(1, signal.SIGKILL)
    assert job.end() == [1, -9, 1]
    assert job.log() == f'{who(job, 1)} died in "training" of iteration 3. {HOW_TO_GO_ON}\n'


def test_a_closed_connection_with_no_death_behind_it_is_told_itself(start: Start) -> None:
    def work(rank: int, phases: Phases, watchdog: Watchdog) -> None:
        if rank == 0:
            phases.iteration = 3
            watchdog.fail_with(RuntimeError("Connection closed by peer"), code=7)
        for step in range(1000):
            phases.iteration = step
            time.sleep(0.2)

    job = start(2, work, timeout_seconds=2.0)
    assert job.end() == [7, 7]
    assert job.log() == (
        f"RuntimeError: Connection closed by peer\n{who(job, 0)} failed in "
        f'"training" of iteration 3: RuntimeError: Connection closed by peer. {HOW_TO_GO_ON}\n'
    )


def test_a_launcher_that_ends_the_survivors_lets_them_speak(start: Start, tmp_path: Path) -> None:
    def work(rank: int, phases: Phases, watchdog: Watchdog) -> None:
        if rank == 0:
            time.sleep(1000)
        (tmp_path / "fails").touch()
        watchdog.fail("stopped.", code=143, patience_seconds=1.0)

    job = start(2, work)
    wait_until((tmp_path / "fails").exists)
    time.sleep(0.1)
    os.kill(job.pids[0], signal.SIGKILL)
    os.kill(job.pids[1], signal.SIGTERM)
    assert job.end() == [-9, 1]
    assert job.errors() == [f'{who(job, 0)} died in "start". {HOW_TO_GO_ON}']


def test_an_error_of_all_ranks_is_told_once(start: Start) -> None:
    def work(rank: int, phases: Phases, watchdog: Watchdog) -> None:
        watchdog.fail("--flag is wrong.", code=2)

    job = start(3, work)
    assert job.end() == [2, 2, 2]
    assert job.log() == "error: --flag is wrong.\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("[pair.cc:553] Connection closed by peer [127.0.0.1]:22105", SILENCE_SECONDS + 5),
        ("NCCL error: remote process exited or there was a network error", SILENCE_SECONDS + 5),
        ("[unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation", 605),
        ("index 3 is out of bounds", 1),
    ],
)
def test_errors_that_follow_from_others_wait_to_learn_of_them(
    tmp_path: Path, text: str, seconds: float
) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    watchdog = Watchdog(Phases(), rank=0, world_size=2, store=store, timeout_seconds=600)
    assert watchdog._patience(RuntimeError(text)) == seconds


def test_ranks_that_end_with_their_launcher_are_not_to_blame(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    gone: list[str] = []
    launcher: Any = SimpleNamespace(gone=lambda: gone[0] if gone else None)
    watchdog = Watchdog(
        Phases(), rank=0, world_size=2, store=store, timeout_seconds=600, launcher=launcher
    )
    watchdog._client.neighbours = {1: replace(Process.this(), started=0)}
    found = watchdog._look(0.2, news=False)
    assert isinstance(found, Diagnosis) and (found.rank, found.did) == (1, "died")
    gone.append("torchrun (pid 4)")
    assert watchdog._look(0.2, news=False) is None


def test_one_rank_alone_has_no_watchdog() -> None:
    assert job_watchdog(Meeting(0, 1, dist.HashStore()), Phases(), 1.0) is None


def test_ranks_that_go_on_are_left_alone(start: Start, tmp_path: Path) -> None:
    """Longer than the timeout: starting; one phase after another while the others wait. Longer than
    silence may last: holding the interpreter, on the same host and on another. And then they end
    one after the other, rank 0, which keeps the store, first."""

    def work(folder: Path, rank: int, phases: Phases, watchdog: Watchdog) -> None:
        time.sleep(2.5)
        phases.iteration = 1
        with phases("gather", waits=True):
            for batch in range(8 if rank == 1 else 1):
                with phases(f"batch {batch}"):
                    time.sleep(0.4 if rank == 1 else 3.2)
        if rank == 2:
            # The same function through CDLL would let the other threads run.
            ctypes.PyDLL(None).usleep(1_500_000)
        (folder / f"before {rank}").touch()
        wait_until(lambda: len(list(folder.glob("before *"))) == 3)
        for step in range(2 * rank):
            phases.iteration = 2 + step
            time.sleep(0.4)
        watchdog.stop()
        (folder / f"after {rank}").touch()

    jobs = {}
    for places in ("aaa", "baa"):
        folder = tmp_path / places
        folder.mkdir()
        job = start(3, functools.partial(work, folder), timeout_seconds=2.0, places=places)
        jobs[folder] = job
    for folder, job in jobs.items():
        assert (job.end(), job.log()) == ([0, 0, 0], "")
        after = [(folder / f"after {rank}").stat().st_mtime_ns for rank in range(3)]
        # The keeper leaves last.
        assert after[1] < after[2] < after[0]


def test_a_job_that_was_stopped_as_a_whole_goes_on(start: Start) -> None:
    """As batch systems do for a job with higher priority."""

    def work(rank: int, phases: Phases, watchdog: Watchdog) -> None:
        for step in range(1, 5):
            phases.iteration = step
            time.sleep(0.4)
        watchdog.stop()

    job = start(2, work, timeout_seconds=1.6)
    for pid in job.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5)
    for pid in job.pids:
        os.kill(pid, signal.SIGCONT)
    assert (job.end(), job.log()) == ([0, 0], "")


def test_a_stopwatch_does_not_count_what_it_did_not_see() -> None:
    watch = Stopwatch(longest_seconds=0.05)
    time.sleep(0.3)
    watch.tick()
    assert watch.seconds == 0.05
    watch.tick()
    assert 0.05 <= watch.seconds <= 0.1
