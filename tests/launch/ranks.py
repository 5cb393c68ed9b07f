"""Forked processes that meet as the ranks of a job, over a port of their own."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_eslm.launch.rendezvous import meet
from megatron_eslm.parallel.meeting import Meeting

Environment = Mapping[str, str]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(rank: int, size: int, port: int, **more: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **more,
    }


class Ranks:
    """Forked processes, each of which meets the others and then works; they end with the test."""

    def __init__(self) -> None:
        self._pipes: dict[int, int] = {}
        self._pids: list[int] = []

    def start(
        self,
        variables: Environment,
        *,
        seconds: float = 20.0,
        launcher: int | None = None,
        work: Callable[[Meeting], Any] = lambda meeting: "met",
        then: Callable[[], None] = lambda: None,
    ) -> int:
        """The process of one rank; its `launcher` is a number that is believed."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ.update(variables)
            by = SimpleNamespace(common_pid=launcher) if launcher is not None else None
            try:
                meeting = meet(seconds, by)  # type: ignore[arg-type]
                said = work(meeting)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writer, json.dumps(said).encode())
            os.close(writer)
            then()
            os._exit(0)
        os.close(writer)
        self._pipes[pid] = reader
        self._pids.append(pid)
        return pid

    def first_to_speak(self, *pids: int) -> int:
        poll = select.poll()
        for pid in pids:
            poll.register(self._pipes[pid], select.POLLIN)
        ready = poll.poll()[0][0]
        return next(pid for pid in pids if self._pipes[pid] == ready)

    def kill(self, pid: int) -> None:
        self._pids.remove(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def said(self, pid: int) -> Any:
        with os.fdopen(self._pipes.pop(pid)) as pipe:
            text = pipe.read()
        return json.loads(text) if text else None

    def end(self) -> None:
        for pid in list(self._pids):
            self.kill(pid)
        for reader in self._pipes.values():
            os.close(reader)


def connections(port: int) -> int:
    """Those of this machine to a port."""
    text = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    lines = [line.split() for line in text.splitlines()]
    return sum(line[2].endswith(f":{port:04X}") and line[3] == "01" for line in lines)


def stay() -> None:
    time.sleep(30)
