"""Signs of life of the ranks, and what follows from them: pure functions, no clock, no store.

Seconds are always durations, counted by the one who watched them pass: clocks of different hosts
are never compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from megatron_eslm.watchdog.phases import PhaseStamp
from megatron_eslm.watchdog.process import Process

MAX_GROUPS = 8
"""Groups of ranks that a message lists."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself, again and again."""

    rank: int
    process: Process
    stamp: PhaseStamp
    idle_seconds: float = 0.0
    """How long it has been there."""
    number: int = 0
    """Grows: a beat that comes back with the same number is an old one."""
    left: bool = False
    """It ended as it should: its process may be gone."""
    silent_seconds: float = 0.0
    """How long it has been the newest; filled in by the one who listens."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Beat:
        fields = json.loads(text)
        fields["process"] = Process(**fields["process"])
        fields["stamp"] = PhaseStamp(**fields["stamp"])
        return cls(**fields)


HOW_TO_GO_ON = "The job ends; start it again with --load to continue from the last checkpoint."


@dataclass(frozen=True)
class Diagnosis:
    """Something is wrong with a rank."""

    rank: int
    did: str
    """What it did; phase and iteration follow: "died" in "optimizer" of iteration 12."""
    further: str = ""
    unless_left: bool = False
    """Whether nothing is wrong if the rank has said that it left."""
    unresponsive: bool = False
    """Whether it may be unable to end by itself."""
    stamp: PhaseStamp | None = None
    """Where it was, if that is known better than from its beats."""

    def text(self, beat: Beat | None, process: Process | None) -> str:
        """The message, with as much as is known of the rank."""
        process = beat.process if beat is not None else process
        who = f"rank {self.rank}"
        if process is not None:
            who += f" (host {process.host}, pid {process.pid})"
        stamp = self.stamp or (beat.stamp if beat is not None else None)
        where = f" in {stamp}" if stamp is not None else ""
        return f"{who} {self.did}{where}{self.further}. {HOW_TO_GO_ON}"


def find_silent(
    beats: Mapping[int, Beat],
    *,
    namespace: str,
    limit_seconds: float,
    start_limit_seconds: float,
) -> Diagnosis | None:
    """Find a rank in another namespace whose heartbeats have stopped.

    One rank can be silent because its interpreter is held up (a page of a slow file system that
    does not come). While another rank of its namespace speaks, that one sees its process and
    reports it.

    Args:
        beats: the newest of each rank.
        namespace: of the caller, whose neighbours are not judged here.
        limit_seconds: how long is too long.
        start_limit_seconds: the same while a rank is starting.
    """

    def too_long(beat: Beat) -> bool:
        limit = start_limit_seconds if beat.stamp.starting else limit_seconds
        return beat.silent_seconds > limit

    namespaces: dict[str, list[int]] = {}
    for rank, beat in sorted(beats.items()):
        if not beat.left and beat.process.namespace != namespace:
            namespaces.setdefault(beat.process.namespace, []).append(rank)
    for ranks in namespaces.values():
        if all(too_long(beats[rank]) for rank in ranks):
            seconds = min(beats[rank].silent_seconds for rank in ranks)
            did = f"has not answered for {seconds:.0f} s"
            if len(ranks) > 1:
                did += f", nor has any other rank of its host ({ranks_text(ranks)})"
            return Diagnosis(ranks[0], f"{did}; last seen", unless_left=True, unresponsive=True)
    return None


def find_hung(
    beats: Mapping[int, Beat],
    *,
    timeout_seconds: float,
    silence_seconds: float,
    leaving: bool,
) -> Diagnosis | None:
    """Whom to blame where no rank has gone on for `timeout_seconds`; None while one has.

    In this order: who is silent; who does not wait for others; who is behind; who came there first.

    Args:
        beats: the newest of each rank.
        timeout_seconds: --distributed-timeout-minutes.
        silence_seconds: from when on silence itself makes a rank suspect.
        leaving: the caller has finished, so a rank that is still starting has no excuse.
    """
    live = {rank: beat for rank, beat in beats.items() if not beat.left}
    if not live or (not leaving and any(beat.stamp.starting for beat in live.values())):
        return None
    idle = {rank: beat.idle_seconds + beat.silent_seconds for rank, beat in live.items()}
    if min(idle.values()) < timeout_seconds:
        return None
    silent = [rank for rank in live if live[rank].silent_seconds > silence_seconds]
    busy = [rank for rank in live if not live[rank].stamp.waits]
    rank = max(silent or busy or live, key=lambda r: (-live[r].stamp.iteration, idle[r], -r))
    others = {r: beat.stamp for r, beat in live.items() if r != rank}
    flag = f"and no rank went on (--distributed-timeout-minutes {timeout_seconds / 60:g})"
    rest = f"{flag}; {_grouped(others)}" if others else flag
    if silent:
        did = f"has not answered for {live[rank].silent_seconds:.0f} s; last seen"
        return Diagnosis(rank, did, f", {rest}", unresponsive=True)
    return Diagnosis(rank, "has been", f" for {idle[rank]:.0f} s, {rest}")


def _grouped(moments: Mapping[int, PhaseStamp]) -> str:
    groups: dict[PhaseStamp, list[int]] = {}
    for rank, stamp in sorted(moments.items()):
        groups.setdefault(stamp, []).append(rank)
    shown = [
        f"{ranks_text(ranks)} {'waiting ' if stamp.waits else ''}in {stamp}"
        for stamp, ranks in list(groups.items())[:MAX_GROUPS]
    ]
    if (more := len(groups) - MAX_GROUPS) > 0:
        shown.append(f"{more} more groups")
    return ", ".join(shown)


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 4", "ranks 0-2, 5": sorted numbers, consecutive ones drawn together."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    plural = "s" if len(runs) > 1 or len(runs[0]) > 1 else ""
    return f"rank{plural} {text}"
