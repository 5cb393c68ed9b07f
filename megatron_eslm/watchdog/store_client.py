"""Exchange with the job's store: heartbeats out, heartbeats and the decision to abort in.

Keys, under the prefix "watchdog": beat/RANK; namespace/NAMESPACE/n, a process there;
namespace/NAMESPACE, the number of these processes; registered, the number of ranks that have
registered; decision, written once.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from megatron_eslm.watchdog.heartbeat import Beat, Diagnosis
from megatron_eslm.watchdog.process import Process
from megatron_eslm.watchdog.status_memory import SharedStatus
from megatron_eslm.watchdog.stopwatch import Stopwatch


@dataclass(frozen=True)
class AbortDecision:
    """Why the job ends; the same on all ranks."""

    finder: int
    """The rank that writes the message to the log."""
    text: str
    code: int
    """Exit code of every rank."""
    unresponsive: int | None = None
    """A rank that its neighbours may have to kill."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> AbortDecision:
        return cls(**json.loads(text))


class StoreClient(threading.Thread):
    """A thread that exchanges heartbeats with the store.

    It is a separate thread because a store whose host is stopped or unplugged blocks it forever.
    Its attributes are replaced, never mutated, so any thread may read them.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        process: Process,
        status: SharedStatus | None,
        beat: Callable[[], Beat],
        observes: bool,
        beat_seconds: float,
    ) -> None:
        """Args:
        store: a connection that no one else uses.
        rank: this rank.
        world_size: number of ranks.
        process: this process.
        status: this process's shared status, if any.
        beat: returns the current beat of this rank.
        observes: whether to read the beats of all ranks.
        beat_seconds: interval between exchanges.
        """
        super().__init__(name="watchdog-client", daemon=True)
        self.neighbours: dict[int, Process] | None = None
        """The other ranks of this namespace; None until all ranks have registered."""
        self.statuses: dict[int, SharedStatus] = {}
        """Shared status of each neighbour, where it could be opened."""
        self.beats: dict[int, Beat] = {}
        """The newest beat of every other rank, if this one observes."""
        self.num_exchanges = 0
        self.broken: str | None = None
        """Error after which there are no more exchanges."""
        self.decision: AbortDecision | None = None
        self.exited: frozenset[int] = frozenset()
        """Ranks that were found dead but had left properly."""
        self.left = threading.Event()
        """Set once the others can read that this rank has left."""

        self._store, self._rank, self._world_size, self._process = store, rank, world_size, process
        self._beat, self._observes, self._beat_seconds = beat, observes, beat_seconds
        self._status = status
        self._diagnoses: queue.SimpleQueue[Diagnosis | AbortDecision] = queue.SimpleQueue()
        self._listening = Stopwatch(1.0 + 2 * beat_seconds)
        self._heard_seconds: dict[int, float] = {}
        self._wake = threading.Event()
        self._closed = False

    def report(self, diagnosis: Diagnosis | AbortDecision) -> None:
        """Propose it as the decision; the outcome appears in `decision` or `exited`."""
        self._diagnoses.put(diagnosis)
        self._wake.set()

    def wake(self) -> None:
        """Exchange now."""
        self._wake.set()

    def close(self) -> None:
        """Stop after the current exchange."""
        self._closed = True
        self._wake.set()

    def run(self) -> None:
        try:
            while True:
                self._exchange()
                if self._closed or self.decision or (self.left.is_set() and self._rank):
                    # The store may go away at any time, so ask it nothing more.
                    return
                self._wake.wait(self._beat_seconds)
                self._wake.clear()
        except RuntimeError as error:  # base class of torch's store errors
            self.broken = str(error).strip().partition("\n")[0]

    def _exchange(self) -> None:
        beat = replace(self._beat(), number=self.num_exchanges)
        self._store.set(f"beat/{self._rank}", beat.encode())
        if self.num_exchanges == 0:
            self._register()
        if beat.left:
            self.left.set()
            if self._rank:
                return
        if self._store.check(["decision"]):
            self.decision = AbortDecision.decode(self._store.get("decision"))
        if self.neighbours is None:
            self._meet()
        elif self._observes:
            self._listen()
        while not self._diagnoses.empty():
            self._decide(self._diagnoses.get())
        self.num_exchanges += 1

    def _register(self) -> None:
        store, namespace = self._store, f"namespace/{self._process.namespace}"
        me = {
            "rank": self._rank,
            "process": asdict(self._process),
            "status": self._status.fd if self._status is not None else None,
        }
        store.set(f"{namespace}/{store.add(namespace, 1)}", json.dumps(me))
        store.add("registered", 1)

    def _meet(self) -> None:
        """Once all ranks have registered, read the neighbours in this namespace."""
        store, namespace = self._store, f"namespace/{self._process.namespace}"
        if store.add("registered", 0) < self._world_size:
            return
        keys = [f"{namespace}/{n + 1}" for n in range(store.add(namespace, 0))]
        neighbours = {}
        for text in store.multi_get(keys):
            found = json.loads(text)
            rank, process = found["rank"], Process(**found["process"])
            if rank != self._rank:
                neighbours[rank] = process
                if found["status"] is not None:
                    # No permission, or already dead: fall back to its beats.
                    with contextlib.suppress(OSError):
                        self.statuses[rank] = SharedStatus.of(process.pid, found["status"])
        self.neighbours = neighbours
        self._listening.tick()

    def _listen(self) -> None:
        self._listening.tick()
        now = self._listening.seconds
        ranks = [rank for rank in range(self._world_size) if rank != self._rank]
        texts = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        beats = {}
        for rank, text in zip(ranks, texts, strict=True):
            beat = Beat.decode(text)
            if rank not in self.beats or self.beats[rank].number != beat.number:
                self._heard_seconds[rank] = now
            beats[rank] = replace(beat, silent_seconds=now - self._heard_seconds[rank])
        self.beats = beats

    def _decide(self, diagnosis: Diagnosis | AbortDecision) -> None:
        if self.decision is not None:
            return
        if isinstance(diagnosis, Diagnosis):
            beat = Beat.decode(self._store.get(f"beat/{diagnosis.rank}"))
            if diagnosis.unless_left and beat.left:
                self.exited |= {diagnosis.rank}
                return
            culprit = diagnosis.rank if diagnosis.unresponsive else None
            diagnosis = AbortDecision(self._rank, diagnosis.text(beat, None), 1, culprit)
        # The first decision wins, and every rank reads that one.
        said = self._store.compare_set("decision", "", diagnosis.encode())
        self.decision = AbortDecision.decode(said)
