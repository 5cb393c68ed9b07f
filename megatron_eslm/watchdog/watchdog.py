"""End the job when a rank dies or hangs, with one message that names the rank.

Otherwise the other ranks would wait in a collective for a rank that never comes, or would all
report a closed connection.

Each rank has two threads. One beats: several times in a few seconds it writes into the job's store
where this rank is (store_client.py; for ranks of one host, status_memory.py is exact). The other,
which never waits for anything, looks

- for processes of the same host that are gone or stopped (every rank),
- for a store that does not answer (every rank),
- for hosts without heartbeats and for a job without progress (the first and the last rank only:
  they read all beats, and the traffic stays linear in the number of ranks).

The first rank to find something writes the decision into the store and the message into the log.
Every rank then ends with the same exit code. If the store is gone, the last live rank of each host
writes what it knows.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from typing import NoReturn

import torch.distributed as dist

from megatron_eslm.parallel.meeting import Meeting
from megatron_eslm.watchdog.heartbeat import HOW_TO_GO_ON, Beat, Diagnosis, find_hung, find_silent
from megatron_eslm.watchdog.last_words import say
from megatron_eslm.watchdog.parent import Launcher
from megatron_eslm.watchdog.phases import Phases
from megatron_eslm.watchdog.process import Process
from megatron_eslm.watchdog.status_memory import SharedStatus
from megatron_eslm.watchdog.stopwatch import Stopwatch
from megatron_eslm.watchdog.store_client import AbortDecision, StoreClient

TICK_SECONDS = 0.2
"""Short, because launchers end the survivors soon after a death and the message must come first."""
SILENCE_SECONDS = 15.0
"""Longest silence of a host or of the store; at most half the timeout."""

_CONNECTION_LOST = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "connection refused",
    "remote process exited",
    "got 0 bytes",
)
_TIMED_OUT = ("timed out", "timeout")


class Watchdog:
    """Watches the ranks of a job (two or more) from `start()` to `stop()`."""

    def __init__(
        self,
        phases: Phases,
        *,
        rank: int,
        world_size: int,
        store: dist.Store,
        timeout_seconds: float,
        rank_zero_keeps_store: bool = True,
        launcher: Launcher | None = None,
        process: Process | None = None,
    ) -> None:
        """Args:
        phases: phases of this rank; shared with its neighbours from now on.
        rank: this rank, from 0.
        world_size: number of ranks; each must have a watchdog.
        store: the job's store; the watchdog opens its own connection.
        timeout_seconds: end the job if no rank makes progress for this long.
        rank_zero_keeps_store: whether rank 0 hosts the store; if not, the launcher does.
        launcher: launcher of this rank, if it has one.
        process: this rank's process; by default the calling one.
        """
        self._phases, self._rank, self._world_size = phases, rank, world_size
        self._timeout_seconds = timeout_seconds
        self._silence_seconds = min(SILENCE_SECONDS, timeout_seconds / 2)
        self._keeper = 0 if rank_zero_keeps_store else None
        self._launcher = launcher
        self._process = process or Process.this()
        self._beat_seconds = min(2.0, max(0.25, world_size / 128))

        self._clock = Stopwatch(longest_seconds=2 * TICK_SECONDS)
        self._seen, self._seen_seconds = phases.now, 0.0
        self._leaving = False
        self._own_failure: tuple[AbortDecision, str] | None = None
        self._stopped_seconds: dict[int, float] = {}
        self._exchanges, self._answered_seconds, self._broken_seconds = 0, 0.0, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._client = StoreClient(
            dist.PrefixStore("watchdog", store.clone()),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            process=self._process,
            status=self._share(phases),
            beat=self._beat,
            observes=rank in (0, world_size - 1),
            beat_seconds=self._beat_seconds,
        )

    def _share(self, phases: Phases) -> SharedStatus | None:
        """Publish every phase to the neighbours as it begins."""
        try:
            status = SharedStatus.create()
        except OSError:
            return None
        status.write(phases.now)
        phases.write = status.write
        return status

    def start(self) -> None:
        """Start watching."""
        self._client.start()
        self._thread.start()

    def stop(self) -> None:
        """Sign off: this rank has finished.

        Rank 0 stays until all ranks have signed off, because it may host the store.
        """
        self._leaving = True
        self._client.wake()
        # If one of these waits blocks forever, the watching thread ends the process.
        self._client.left.wait()
        while self._rank == 0 and not self._all_left():
            time.sleep(TICK_SECONDS / 4)
        self._client.close()
        # The interpreter aborts if it exits while a thread is inside torch.
        self._client.join()
        self._ended.set()
        self._thread.join()

    def fail(self, message: str, *, code: int, patience_seconds: float = 0.0) -> NoReturn:
        """End the job with `message`, logged once even if several ranks fail with it.

        Call from the main thread.

        Args:
            message: the reason, for the log.
            code: exit code of all ranks.
            patience_seconds: time to wait first; if another rank turns out to be the cause, its
                message is logged instead.
        """
        self._fail(message, code, patience_seconds)

    def fail_with(self, error: BaseException, *, code: int = 1) -> NoReturn:
        """End the job because of an unexpected error; logs traceback, rank and phase.

        Call from the main thread. If another rank has died or failed first, its message is logged
        instead: a lost connection or a timed-out collective is most likely the consequence.

        Args:
            error: the exception.
            code: exit code of all ranks.
        """
        first = (str(error).strip() or "no message").partition("\n")[0]
        diagnosis = Diagnosis(self._rank, "failed", f": {type(error).__name__}: {first}")
        trace = "".join(traceback.format_exception(error))
        self._fail(diagnosis.text(self._beat(), None), code, self._patience(error), trace)

    def _fail(self, message: str, code: int, patience_seconds: float, trace: str = "") -> NoReturn:
        # A launcher that has seen a rank end sends SIGTERM to the others, possibly before they have
        # written their messages. Ctrl-C, by contrast, ends the process at once from now on.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.sleep(patience_seconds)
        self._own_failure = AbortDecision(self._rank, message, code), trace
        # The watching thread ends this process, whichever rank is at fault.
        self._thread.join()
        say(f"{trace}error: {message}\n")
        os._exit(code)

    def _patience(self, error: BaseException) -> float:
        """Seconds to wait for another rank to turn out to be the cause."""
        text = str(error).lower()
        if any(words in text for words in _CONNECTION_LOST):
            return self._silence_seconds + 5.0
        if any(words in text for words in _TIMED_OUT):
            return self._timeout_seconds + 5.0
        return 5 * TICK_SECONDS

    def _all_left(self) -> bool:
        beats = self._client.beats.values()
        return len(beats) == self._world_size - 1 and all(beat.left for beat in beats)

    def _beat(self) -> Beat:
        now = self._phases.now
        idle_seconds = self._clock.seconds - self._seen_seconds if now is self._seen else 0.0
        return Beat(self._rank, self._process, now, idle_seconds, left=self._leaving)

    def _watch(self) -> None:
        client = self._client
        brought: Diagnosis | AbortDecision | None = None
        brought_seconds = 0.0
        while not self._ended.wait(TICK_SECONDS if brought is None else TICK_SECONDS / 10):
            before_seconds = self._clock.seconds
            self._clock.tick()
            now_seconds = self._clock.seconds
            if self._phases.now is not self._seen:
                self._seen, self._seen_seconds = self._phases.now, now_seconds
            news = client.num_exchanges != self._exchanges
            if news:
                self._exchanges, self._answered_seconds = client.num_exchanges, now_seconds

            if client.decision is not None:
                self._end(client.decision, speaks=client.decision.finder == self._rank)
            if isinstance(brought, Diagnosis) and brought.rank in client.exited:
                brought = None
            if brought is None:
                brought = self._look(now_seconds - before_seconds, news)
                if brought is not None:
                    brought_seconds = now_seconds
                    client.report(brought)
            if brought is not None and (
                client.broken is not None
                or self._keeper_is_gone(brought)
                or now_seconds - brought_seconds > self._silence_seconds
            ):
                self._end_alone(brought)
            self._check_store(now_seconds, now_seconds - before_seconds)

    def _look(self, tick_seconds: float, news: bool) -> Diagnosis | AbortDecision | None:
        """Return what is wrong; None if nothing is."""
        if self._own_failure is not None:
            return self._own_failure[0]
        if self._launcher is not None and self._launcher.gone() is not None:
            return None  # The ranks of this host are about to end; none is at fault.
        if diagnosis := self._look_at_neighbours(tick_seconds):
            return diagnosis
        if not (news and self._client.beats):
            return None
        return find_silent(
            self._client.beats,
            namespace=self._process.namespace,
            limit_seconds=self._silence_seconds,
            start_limit_seconds=self._timeout_seconds,
        ) or find_hung(
            {**self._client.beats, self._rank: self._beat()},
            timeout_seconds=self._timeout_seconds,
            silence_seconds=self._silence_seconds,
            leaving=self._leaving,
        )

    def _look_at_neighbours(self, tick_seconds: float) -> Diagnosis | None:
        for rank, process in (self._client.neighbours or {}).items():
            if rank in self._client.exited:
                continue
            state = process.state()
            stopped = self._stopped_seconds.get(rank, 0.0) + tick_seconds
            self._stopped_seconds[rank] = stopped = stopped if state == "stopped" else 0.0
            if state == "gone":
                did = "died"
            elif stopped > self._silence_seconds:
                did = f"has not answered for {stopped:.0f} s, stopped by a signal; last seen"
            else:
                continue
            status = self._client.statuses.get(rank)
            return Diagnosis(
                rank,
                did,
                unless_left=True,
                unresponsive=state == "stopped",
                stamp=status.read() if status is not None else None,
            )
        return None

    def _keeper_is_gone(self, brought: Diagnosis | AbortDecision) -> bool:
        """Whether the store's host is the rank found dead, so that the store may never answer."""
        return (
            isinstance(brought, Diagnosis) and brought.unless_left and brought.rank == self._keeper
        )

    def _check_store(self, now_seconds: float, tick_seconds: float) -> None:
        """End if the store is lost, since deaths on other hosts would go unnoticed."""
        silent_seconds = now_seconds - self._answered_seconds
        if self._client.broken is not None:
            # A dying process closes its connections shortly before /proc shows it as gone.
            self._broken_seconds += tick_seconds
            if self._broken_seconds < 5 * TICK_SECONDS:
                return
            how = f"is lost ({self._client.broken})"
        else:
            limit_seconds = self._silence_seconds
            if self._seen.starting or self._keeper in (self._client.neighbours or {}):
                # The store is slow, not lost: its process was just seen running.
                limit_seconds = self._timeout_seconds
            if silent_seconds < limit_seconds:
                return
            how = f"has not answered for {silent_seconds:.0f} s"
        keeper = "rank 0" if self._keeper == 0 else "the launcher"
        text = f"the connection to {keeper}, which keeps the job's store, {how}. {HOW_TO_GO_ON}"
        self._end_alone(AbortDecision(self._rank, text, 1))

    def _end_alone(self, found: Diagnosis | AbortDecision) -> NoReturn:
        """End without the store; the last live rank of this host writes the message."""
        neighbours = self._client.neighbours or {}
        if isinstance(found, Diagnosis):
            beat = self._client.beats.get(found.rank)
            text = found.text(beat, neighbours.get(found.rank))
            found = AbortDecision(self._rank, text, 1, found.rank if found.unresponsive else None)
        left = [rank for rank, process in neighbours.items() if process.state() == "runs"]
        self._end(found, speaks=self._rank > max(left, default=-1))

    def _end(self, decision: AbortDecision, *, speaks: bool) -> NoReturn:
        if speaks:
            own = self._own_failure
            trace = own[1] if own is not None and own[0] == decision else ""
            say(f"{trace}error: {decision.text}\n")
        # Time for every rank to read the decision before this process disappears.
        time.sleep(1.0 + 2 * self._beat_seconds)
        if decision.unresponsive in (neighbours := self._client.neighbours or {}):
            neighbours[decision.unresponsive].kill()
        # The main thread may be stuck in a collective forever.
        os._exit(decision.code)


def job_watchdog(
    meeting: Meeting, phases: Phases, timeout_seconds: float, launcher: Launcher | None = None
) -> Watchdog | None:
    """Start a watchdog over the ranks of a job; None for a single rank.

    Args:
        meeting: result of the rendezvous.
        phases: phases of this rank.
        timeout_seconds: end the job if no rank makes progress for this long.
        launcher: launcher of this rank, if it has one.
    """
    if meeting.world_size == 1:
        return None
    watchdog = Watchdog(
        phases,
        rank=meeting.rank,
        world_size=meeting.world_size,
        store=meeting.store,
        timeout_seconds=timeout_seconds,
        rank_zero_keeps_store=not meeting.launcher_keeps_store,
        launcher=launcher,
    )
    watchdog.start()
    return watchdog
