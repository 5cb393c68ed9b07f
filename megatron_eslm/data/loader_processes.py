"""Loader processes that end on request or together with the training process.

Process w of W makes batches w, w + W, w + 2W, ... and writes them into its own pipe; the training
process reads the pipes in turn. There is no shared memory, which is scarce in containers, and no
lock that a dying process could leave locked. So a failed process always shows at its pipe: the pipe
closes, or nothing arrives.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pickle
import select
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.watchdog.heartbeat import HOW_TO_GO_ON
from megatron_eslm.watchdog.parent import heed_parent_only
from megatron_eslm.watchdog.process import Process
from megatron_eslm.watchdog.stopwatch import Stopwatch

CHECK_SECONDS = 1.0
"""Interval between two looks at a process that delivers nothing."""
STOPPED_SECONDS = 15.0
"""How long a process may be stopped by a signal; at most half the timeout."""

Numbers = list[int]
"""Sample numbers of a batch."""


class Batches(Protocol):
    """Sized collection of a rank's batches; every iteration yields the same ones."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Numbers]: ...


_SIZE = struct.Struct("<Q")
_PIPE_BYTES = 1 << 20
"""Pipe capacity: how far a process may work ahead of the current batch."""
_LIKELY = {
    signal.SIGKILL: "Most likely the machine ran out of memory; --num-workers 0 loads in the "
    "training process and needs the least.",
    signal.SIGBUS: "A file of the data was cut short, or its disk failed, while it was read.",
}


class LoaderError(RuntimeError):
    """A loader process has died or delivers nothing. The message is one paragraph."""


class RemoteTraceback(Exception):
    """Traceback from a loader process, attached as the cause of its error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class _Worker:
    process: Process
    reader: int
    """Read end of its pipe."""


class LoaderProcesses:
    """Iterator over `make(numbers)` for all `batches`, in order.

        loader = LoaderProcesses(make, [[0, 1], [2, 3]], workers=2, timeout_seconds=600)
        for batch in loader: ...

    Create it in a thread that lives as long as the process, because the kernel ends the loader
    processes together with the thread that forked them.

    Args:
        make: makes a batch. Inherited by fork, so it need not be picklable, but its result must be.
        batches: sample numbers of each batch; iterated here and in every process.
        workers: number of processes, at least one; at most one per batch is started.
        timeout_seconds: how long to wait for a batch.

    Raises:
        ConfigError: the system cannot start the processes.
        LoaderError: (while iterating) a process has died or delivers nothing.
    """

    def __init__(
        self,
        make: Callable[[Numbers], Any],
        batches: Batches,
        *,
        workers: int,
        timeout_seconds: float,
    ) -> None:
        self._batches, self._timeout_seconds = iter(batches), timeout_seconds
        self._workers: list[_Worker] = []
        self._num_made = 0
        workers = min(workers, len(batches))
        try:
            for w in range(workers):
                self._workers.append(_start(make, batches, w, workers))
        except OSError as error:
            started = len(self._workers)
            self.close()
            raise ConfigError(
                f"--num-workers {workers}: the system can start only {started} loader "
                f"processes here ({error.strerror}). Use fewer; 0 loads in the training process."
            ) from error

    def __iter__(self) -> LoaderProcesses:
        return self

    def __next__(self) -> Any:
        numbers = next(self._batches, None)
        if numbers is None or not self._workers:
            self.close()
            raise StopIteration
        w = self._num_made % len(self._workers)
        error, result = pickle.loads(self._receive(w, numbers))
        if error is not None:
            self.close()
            raise error from RemoteTraceback(result)
        self._num_made += 1
        return result

    def close(self) -> None:
        """End the processes, including stopped ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            os.close(worker.reader)
            with contextlib.suppress(ChildProcessError):
                # Kill only an unreaped child: its PID cannot have been reused yet.
                if os.waitpid(worker.process.pid, os.WNOHANG) == (0, 0):
                    os.kill(worker.process.pid, signal.SIGKILL)
                    os.waitpid(worker.process.pid, 0)

    def __del__(self) -> None:
        self.close()

    def _receive(self, w: int, numbers: Numbers) -> bytearray:
        """Receive the next result of process w, which should be the batch of `numbers`."""
        watch = _Watch(self._workers[w].process, self._timeout_seconds)
        (size,) = _SIZE.unpack(self._read(w, numbers, _SIZE.size, watch))
        return self._read(w, numbers, size, watch)

    def _read(self, w: int, numbers: Numbers, size: int, watch: _Watch) -> bytearray:
        reader = self._workers[w].reader
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        data = bytearray()
        while len(data) < size:
            if not poll.poll(1000 * CHECK_SECONDS):
                if trouble := watch.trouble():
                    self._fail(w, numbers, trouble)
                continue
            part = os.read(reader, min(size - len(data), _PIPE_BYTES))
            if not part:
                self._fail(w, numbers, self._end(w))
            data += part
        return data

    def _end(self, w: int) -> str:
        """Say how a process ended whose pipe has closed."""
        try:
            _, status = os.waitpid(self._workers[w].process.pid, 0)
        except ChildProcessError:
            return "ended"
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"ended with exit code {code}"
        number = signal.Signals(-code)
        return f"was killed by {number.name}. {_LIKELY.get(number, '')}".rstrip()

    def _fail(self, w: int, numbers: Numbers, trouble: str) -> NoReturn:
        process = self._workers[w].process
        who = f"loader process {w + 1} of {len(self._workers)} (pid {process.pid})"
        self.close()
        stop = "" if trouble.endswith(".") else "."
        raise LoaderError(
            f"{who}, which was to deliver samples {numbers[0]} to {numbers[-1]}, "
            f"{trouble}{stop} {HOW_TO_GO_ON}"
        )


class _Watch:
    """Monitors a process that delivers nothing."""

    def __init__(self, process: Process, timeout_seconds: float) -> None:
        self._process, self._timeout_seconds = process, timeout_seconds
        self._clock = Stopwatch(longest_seconds=2 * CHECK_SECONDS)
        self._stopped_since: float | None = None

    def trouble(self) -> str | None:
        """Return what is wrong; None if nothing is."""
        self._clock.tick()
        now = self._clock.seconds
        if self._process.state() != "stopped":
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since >= min(STOPPED_SECONDS, self._timeout_seconds / 2):
            return f"has been stopped by a signal for {now - self._stopped_since:.0f} s"
        if now >= self._timeout_seconds:
            return (
                f"has delivered nothing for {now:.0f} s (--distributed-timeout-minutes "
                f"{self._timeout_seconds / 60:g}). The disk may be slow or hung"
            )
        return None


def _start(make: Callable[[Numbers], Any], batches: Batches, w: int, workers: int) -> _Worker:
    """Fork process w of `workers`, which writes its batches into a pipe.

    Raises:
        OSError: the system is out of processes, file descriptors or memory.
    """
    parent = os.getpid()
    reader, writer = os.pipe()
    # Block signals: the new process still has the signal handlers of the training process.
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            mine = itertools.islice(batches, w, None, workers)
            _serve(make, mine, writer, parent)
    except OSError:
        os.close(reader)
        raise
    finally:
        os.close(writer)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _Worker(Process.of(pid), reader)


def _serve(
    make: Callable[[Numbers], Any], batches: Iterator[Numbers], writer: int, parent: int
) -> NoReturn:
    """Run a loader process; never returns."""
    code = 1
    try:
        heed_parent_only(parent)
        torch.set_num_threads(1)  # The threads of torch's pool are not forked.
        with contextlib.suppress(OSError):
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        for numbers in batches:
            done: tuple[Exception | None, Any]
            try:
                done = None, make(numbers)
            except Exception as error:
                done = _portable(error)
            data = pickle.dumps(done, protocol=pickle.HIGHEST_PROTOCOL)
            _write(writer, _SIZE.pack(len(data)) + data)
        code = 0
    finally:
        # Never return: the child would continue as a second training process.
        os._exit(code)


def _portable(error: Exception) -> tuple[Exception, str]:
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error, text


def _write(writer: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(writer, view) :]
