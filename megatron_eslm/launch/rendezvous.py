"""Rendezvous of the ranks before they form process groups; reports missing and foreign ranks.

Rank 0 hosts a store at MASTER_ADDR:MASTER_PORT (under torchrun the launcher hosts it). Every other
rank writes an entry. Rank 0 answers each entry: a rank of another job is refused, the others get a
fresh token. All keys of the job are under that token, so leftovers of another job or of an earlier
attempt are never read. Each rank then takes its seat, one per rank. Rank 0 starts the job when all
seats are taken, or fails with the missing ranks.

Keys under "meeting/ATTEMPT": entry/N, counted by entries; answer/ID; begun. Keys under the token:
seat/RANK, counted by seated; end, which is empty if all ranks have come and otherwise says why the
job ends.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.attendee import Attendee
from megatron_eslm.launch.launchers import Launch, described
from megatron_eslm.parallel.meeting import Meeting
from megatron_eslm.watchdog.heartbeat import ranks_text
from megatron_eslm.watchdog.parent import Launcher
from megatron_eslm.watchdog.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

RENDEZVOUS_SECONDS = 300.0
"""Default time that a rank waits for the others."""
NOTE_SECONDS = 10.0
"""A rank logs whom it waits for after this time."""
LOOK_SECONDS = 0.1
"""Polling interval of the store."""
STORE_SECONDS = 30.0
"""Longest time that the store may take to answer."""

OWN_PORT = "Give each job a port of its own: --master_port of the launcher, or MASTER_PORT."


def meet(limit_seconds: float = RENDEZVOUS_SECONDS, launcher: Launcher | None = None) -> Meeting:
    """Wait until all ranks that the environment describes have come. A single rank opens no port.

    Args:
        limit_seconds: how long to wait for the others, counted from this call.
        launcher: launcher of this process, the same for all ranks of a job on one machine.

    Raises:
        ConfigError: a rank is missing; another job or program uses the port; the environment
            contradicts itself (see `described`).
    """
    launch = described()
    if launch is None:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    if launch is None or launch.world_size == 1:
        return Meeting(0, 1, dist.HashStore())
    launcher_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = "the launcher" if launcher_keeps_store else "rank 0"
    attendee = Attendee.of(launch, launcher)
    wait = _Wait(launch, limit_seconds)

    def sit_down() -> dist.Store:
        if launch.rank == 0 and not launcher_keeps_store:
            store = _open_store(launch, wait)
        else:
            store = _find_store(launch, wait)
        table = dist.PrefixStore(f"meeting/{_attempt()}", store)
        try:
            if launch.rank == 0:
                return _host_ranks(table, attendee, wait)
            return _join(table, attendee, wait, rank_zero_keeps_store=not launcher_keeps_store)
        except dist.DistError as error:
            raise ConfigError(
                f"The store at {wait.where}, hosted by {keeper}, was lost before all ranks had "
                f"met ({_first_line(error)})."
            ) from error

    own = _while_answered(sit_down, wait, keeper)
    return Meeting(launch.rank, launch.world_size, own, launcher_keeps_store)


def _while_answered(work: Callable[[], dist.Store], wait: _Wait, keeper: str) -> dist.Store:
    """Run `work` in a thread and return its result, unless the store stops answering.

    A store whose process is stopped never answers, nor does another program that has its port.
    """
    result: Future[dist.Store] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    clock, looks, since = Stopwatch(longest_seconds=1.0), wait.num_looks, 0.0
    while True:
        with contextlib.suppress(FutureTimeoutError):
            return result.result(timeout=2 * LOOK_SECONDS)
        clock.tick()
        if wait.num_looks != looks:
            looks, since = wait.num_looks, clock.seconds
        if clock.seconds - since > STORE_SECONDS:
            raise ConfigError(
                f"rank {wait.launch.rank} has had no answer at {wait.where} for "
                f"{STORE_SECONDS:g} s. Either {keeper} is stopped there, or another program uses "
                f"the port. {OWN_PORT}"
            )


class _Wait:
    """Time limit of this rank's wait, and its messages."""

    def __init__(self, launch: Launch, limit_seconds: float) -> None:
        self.where = f"{launch.address}:{launch.port}"
        self.limit_seconds = limit_seconds
        self.launch = launch
        self.num_looks = 0
        self._begin = time.monotonic()
        self._noted = False

    def start_again(self, limit_seconds: float) -> None:
        """Restart the wait with a new limit."""
        self.limit_seconds, self._begin = limit_seconds, time.monotonic()

    @property
    def left_seconds(self) -> float:
        return self._begin + self.limit_seconds - time.monotonic()

    @property
    def limit(self) -> str:
        """The limit in words, for messages."""
        seconds = self.limit_seconds
        return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"

    def looks(self, missing: Callable[[], str] | None) -> Iterator[None]:
        """Yield every LOOK_SECONDS until the time is up; log once, late, who is `missing`."""
        while self.left_seconds > 0:
            self.num_looks += 1
            yield
            waited = time.monotonic() - self._begin
            if missing is not None and waited > NOTE_SECONDS and not self._noted:
                self._noted = True
                # If rank 0 is missing, one rank per machine logs it: rank 1 on its own machine.
                if self.launch.rank in (0, 1) or self.launch.local_rank == 0:
                    level = logging.INFO if self.launch.rank == 0 else logging.ERROR
                    text = f"rank {self.launch.rank} waits for {missing()} at {self.where}"
                    logger.log(level, "%s", text)
            time.sleep(LOOK_SECONDS)

    def failed(self, missing: str) -> ConfigError:
        return ConfigError(
            f"rank {self.launch.rank} waited {self.limit} for {missing} at {self.where}, in vain. "
            "Start all ranks with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, make sure that "
            "no firewall separates the machines, and if they start further apart than that, "
            "raise --rendezvous-timeout-minutes."
        )


def _attempt() -> str:
    """Name of this attempt. Under torchrun, a job restarted after a failure reuses its store."""
    env = os.environ
    return f"{env.get('TORCHELASTIC_RUN_ID', '')}/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _seconds(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(1.0, seconds))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _open_store(launch: Launch, wait: _Wait) -> dist.Store:
    try:
        # The store listens on all addresses; this process itself connects locally.
        return dist.TCPStore(
            "127.0.0.1",
            launch.port,
            is_master=True,
            timeout=_seconds(wait.left_seconds),
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        text = str(error)
        if "EADDRINUSE" in text:
            raise ConfigError(
                f"MASTER_PORT {launch.port} is taken on {socket.gethostname()} by another job or "
                f"program. {OWN_PORT}"
            ) from error
        raise ConfigError(
            f"rank 0 cannot listen at MASTER_PORT {launch.port} of {socket.gethostname()} "
            f"({_first_line(error)}). Set another port: --master_port of the launcher, or "
            "MASTER_PORT."
        ) from error


def _find_store(launch: Launch, wait: _Wait) -> dist.Store:
    """Connect to the store, which may not be up yet."""
    missing = "rank 0" if launch.rank else "the launcher's store"
    why = "nobody listens there"
    for _ in wait.looks(lambda: missing):
        try:
            # A TCPStore that cannot connect prints a C++ stack trace.
            socket.create_connection((launch.address, launch.port), timeout=5.0).close()
        except OSError as error:
            why = error.strerror or str(error)
            continue
        try:
            return dist.TCPStore(
                launch.address,
                launch.port,
                is_master=False,
                timeout=_seconds(wait.left_seconds),
                wait_for_workers=False,
            )
        except dist.DistError as error:
            why = f"another program listens there: {_first_line(error)}"
    raise wait.failed(f"{missing} ({why})")


def _host_ranks(table: dist.Store, me: Attendee, wait: _Wait) -> dist.Store:
    """On rank 0: answer entries until all other ranks have taken their seats."""
    own = dist.PrefixStore(me.id, table)
    seen, unread = 0, set[int]()

    def missing() -> str:
        return _missing(own, me.world_size)

    for _ in wait.looks(missing):
        come = table.add("entries", 0)
        unread |= set(range(seen + 1, come + 1))
        seen = come
        for n in sorted(unread):
            if not table.check([f"entry/{n}"]):
                continue  # Counted but not written yet.
            unread.remove(n)
            other = Attendee.decode(table.get(f"entry/{n}"))
            refusal = _refusal(me, other, wait.where)
            answer = {"refused": refusal} if refusal else {"token": me.id}
            table.set(f"answer/{other.id}", json.dumps({**answer, "from": me.who}))
        if own.add("seated", 0) == me.world_size - 1:
            table.set("begun", me.who)
            own.set("end", "")
            return own
    error = wait.failed(missing())
    own.set("end", str(error))
    # The store ends with this process; give the others time to read the reason.
    time.sleep(10 * LOOK_SECONDS)
    raise error


def _missing(own: dist.Store, world_size: int) -> str:
    ranks = [rank for rank in range(1, world_size) if not own.check([f"seat/{rank}"])]
    return f"{len(ranks)} of {world_size} ranks ({ranks_text(ranks)})"


def _refusal(me: Attendee, other: Attendee, where: str) -> str | None:
    """Say why `other` is not a rank of this job; None if it is."""
    if other.world_size != me.world_size:
        return (
            f"{other.who} belongs to a job of WORLD_SIZE={other.world_size}, but {where} is used "
            f"by {me.who} of a job of WORLD_SIZE={me.world_size}. {OWN_PORT}"
        )
    if other.job != me.job:
        return (
            f"{other.who} belongs to another job ({other.job or 'unnamed'}) than {me.who}, which "
            f"uses {where} ({me.job or 'unnamed'}). {OWN_PORT}"
        )
    return None


def _join(
    table: dist.Store, me: Attendee, wait: _Wait, *, rank_zero_keeps_store: bool
) -> dist.Store:
    """On other ranks: write an entry, read the answer, take the seat, wait for the other ranks."""
    n = table.add("entries", 1)
    table.set(f"entry/{n}", me.encode())
    answer = None
    for _ in wait.looks(lambda: "rank 0"):
        if table.check([f"answer/{me.id}"]):
            answer = json.loads(table.get(f"answer/{me.id}"))
            break
        # Skip this if the launcher hosts the store: it may hold keys of an earlier attempt.
        if rank_zero_keeps_store and table.check(["begun"]):
            raise ConfigError(
                f"{me.who} is not part of the job that runs at {wait.where}: all its "
                f"{me.world_size} ranks have already joined. The store is hosted by "
                f"{table.get('begun').decode()}. {OWN_PORT}"
            )
    if answer is None:
        raise wait.failed("rank 0")
    if "refused" in answer:
        raise ConfigError(answer["refused"])
    own = dist.PrefixStore(answer["token"], table)
    _take_seat(own, me)
    # Rank 0, which may have started later than this rank, decides when to give up.
    wait.start_again(wait.limit_seconds + STORE_SECONDS)
    for _ in wait.looks(None):
        if own.check(["end"]):
            if text := own.get("end").decode():
                raise ConfigError(text)
            return own
    raise wait.failed(f"a message from {answer['from']}")


def _take_seat(own: dist.Store, me: Attendee) -> None:
    seat, mine = f"seat/{me.rank}", me.encode()
    found = own.compare_set(seat, "", mine)
    holder = Attendee.decode(found)
    if holder.id == me.id:
        own.add("seated", 1)
        return
    gone = holder.process.namespace == me.process.namespace and holder.process.state() == "gone"
    # If the holder died while waiting, the process that replaces it takes over its seat.
    if not gone or Attendee.decode(own.compare_set(seat, found.decode(), mine)).id != me.id:
        raise ConfigError(
            f"{me.who}: the seat of this rank is taken by pid {holder.process.pid} on host "
            f"{holder.process.host}. Give each process a RANK of its own, and each job a port: "
            "--master_port of the launcher, or MASTER_PORT."
        )
