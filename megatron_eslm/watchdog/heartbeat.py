"""Heartbeats of the ranks and their diagnosis: pure functions, no clock, no store.

All seconds are durations measured by one process; clocks of different hosts are never compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from megatron_eslm.watchdog.phases import PhaseStamp
from megatron_eslm.watchdog.process import Process

MAX_GROUPS = 8
"""Maximum number of rank groups listed in a message."""


@dataclass(frozen=True)
class Beat:
    """Periodic status report of a rank."""

    rank: int
    process: Process
    stamp: PhaseStamp
    idle_seconds: float = 0.0
    """How long the rank has been in this phase."""
    number: int = 0
    """Sequence number; an unchanged number means that no new beat has arrived."""
    left: bool = False
    """The rank has finished properly, so its process may be gone."""
    silent_seconds: float = 0.0
    """Time since this beat was first seen; filled in by the reader."""

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
    """What happened, followed in the message by phase and iteration: "died" in "optimizer" ..."""
    further: str = ""
    """Text after the phase."""
    unless_left: bool = False
    """Drop the diagnosis if the rank turns out to have left properly."""
    unresponsive: bool = False
    """The rank may be unable to exit, so its neighbours should kill it."""
    stamp: PhaseStamp | None = None
    """The rank's last phase, if known more precisely than from its beats."""

    def text(self, beat: Beat | None, process: Process | None) -> str:
        """Format the message with whatever is known about the rank."""
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

    All ranks of that namespace must be silent. A single silent rank may only have a blocked
    interpreter (waiting for a page from a slow file system); a live neighbour watches its process
    and reports its death.

    Args:
        beats: the newest beat of each rank.
        namespace: the caller's namespace, whose ranks are not judged here.
        limit_seconds: longest silence allowed.
        start_limit_seconds: longest silence allowed while a rank is starting.
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
    """Find the rank at fault if none has made progress for `timeout_seconds`; otherwise None.

    Prefers silent ranks, then ranks that do not wait for others. Among these, takes the lowest
    iteration, then the longest idle time.

    Args:
        beats: the newest beat of each rank.
        timeout_seconds: --distributed-timeout-minutes, in seconds.
        silence_seconds: a rank silent for longer than this is suspect.
        leaving: the caller has finished, so a rank that is still starting counts as hung too.
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
    """Format sorted ranks with ranges: "rank 4", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    plural = "s" if len(runs) > 1 or len(runs[0]) > 1 else ""
    return f"rank{plural} {text}"
