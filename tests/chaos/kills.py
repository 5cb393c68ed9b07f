"""Kills at random moments; each job is started again until it has ended.

A job saves after every step and loads from where it saves, as a requeued job does. Whatever was
killed, and whenever, in the end its metrics and its last checkpoint are those of a run that nobody
touched.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.outcome import Outcome
from tests.chaos.table import Table, Verdict
from tests.training.runs import words
from tests.training.test_command_line import PYTHON, TORCHRUN, members, start, stop

ITERS = 60
TARGETS = ("tree", "launcher", "rank", "loader", "stopped rank")
GONE_SECONDS = 150.0
"""Until when all processes of a killed job have to be gone: after the limits below, in a start, a
launcher waits half a minute for ranks that it has sent SIGTERM."""


@dataclass(frozen=True)
class Layout:
    """How a job is spread over processes."""

    name: str
    ranks: int
    micro_batch_size: int
    flags: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        return [w if w != "2" else str(self.ranks) for w in TORCHRUN] if self.ranks > 1 else PYTHON

    def targets(self) -> tuple[str, ...]:
        """What can be killed. A process alone is its own launcher."""
        return TARGETS if self.ranks > 1 else ("tree", "rank", "loader")


LAYOUTS = (
    Layout("one process", 1, 8, ()),
    Layout("DP 2, ZeRO 2", 2, 4, ("--zero-stage", "2")),
    Layout(
        "TP 2 x PP 2",
        4,
        8,
        ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    ),
)


def argv(data: list[str], layout: Layout, folder: Path) -> list[str]:
    """Flags of a job that can be requeued."""
    return words(
        data,
        *("--global-batch-size", 16, "--eslm-alpha", "0.3", "--eslm-adaptive"),
        *("--eslm-adapt-interval", 5, "--eval-interval", 10, "--num-workers", 1),
        *("--save", folder / "save", "--load", folder / "save", "--save-interval", 1),
        *("--metrics-file", folder / "m.jsonl", "--distributed-timeout-minutes", "0.2"),
        # For a rank that is stopped before the others have met it.
        *("--rendezvous-timeout-minutes", "0.5"),
        *layout.flags,
        iters=ITERS,
        micro_batch_size=layout.micro_batch_size,
    )


def kill_jobs(
    table: Table, data: list[str], layout: Layout, root: Path, kills: int, rng: random.Random
) -> None:
    """Kill jobs of one layout so many times, and compare each with a job left alone."""
    part = f"kills, {layout.name}"
    expected = _left_alone(data, layout, root / "alone")
    done, number = 0, 0
    while done < kills:
        folder = root / f"job{number}"
        folder.mkdir(parents=True)
        number += 1
        struck, complaint = _kill_one(data, layout, folder, kills - done, rng)
        if complaint is None:
            complaint = expected.difference(Outcome.of(folder / "m.jsonl", folder / "save"))
        verdict = Verdict.SURVIVED if complaint is None else Verdict.LOST
        table.add(part, verdict, complaint or "", times=len(struck))
        done += len(struck)
        shutil.rmtree(folder)


def _left_alone(data: list[str], layout: Layout, folder: Path) -> Outcome:
    folder.mkdir(parents=True)
    complaint = _finish(_start(data, layout, folder), folder)
    assert complaint is None, complaint
    return Outcome.of(folder / "m.jsonl", folder / "save")


def _kill_one(
    data: list[str], layout: Layout, folder: Path, most: int, rng: random.Random
) -> tuple[list[str], str | None]:
    """Kill one job until it is done or `most` kills are; what was killed, and what went wrong."""
    struck: list[str] = []
    while len(struck) < most:
        process = _start(data, layout, folder)
        target = rng.choice(layout.targets())
        try:
            if not _wait_for_a_moment(process, folder, rng):
                break  # it had ended before
            if not _strike(process, folder, layout, target, rng):
                continue
            struck.append(target)
            if left := _left_after(folder, GONE_SECONDS):
                return struck, f"{target} killed, and {left} processes are still there"
        finally:
            stop(process, folder)
    complaint = _finish(_start(data, layout, folder), folder)
    return struck, complaint and f"after killing {', '.join(struck)}: {complaint}"


def _start(data: list[str], layout: Layout, folder: Path) -> subprocess.Popen:
    return start(layout.command, *argv(data, layout, folder), cwd=folder)


def _finish(process: subprocess.Popen, folder: Path) -> str | None:
    """Wait for a job; what went wrong, if anything did."""
    try:
        _, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        return "it hung"
    finally:
        stop(process, folder)
    return None if process.returncode == 0 else f"exit code {process.returncode}: {err[-1500:]}"


def _wait_for_a_moment(process: subprocess.Popen, folder: Path, rng: random.Random) -> bool:
    """Wait for some moment of the start, or of training; False where the job ended before it."""
    if rng.random() < 0.3:
        _sleep(process, rng.uniform(0.0, 8.0))
    else:
        metrics = folder / "m.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None:
            if metrics.exists() and metrics.stat().st_size != size:
                break
            time.sleep(0.02)
        _sleep(process, rng.uniform(0.0, 1.5))
    return process.poll() is None


def _sleep(process: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def _strike(
    process: subprocess.Popen, folder: Path, layout: Layout, target: str, rng: random.Random
) -> bool:
    """Send the signal; False where the target is not there at this moment."""
    number = signal.SIGKILL
    if target == "tree":
        pids = list(members(folder))
    elif target == "launcher":
        pids = [process.pid]
    else:
        found = _children(process.pid, layout)
        pids = found["loaders" if target == "loader" else "ranks"]
        if not pids:
            return False
        pids = [rng.choice(pids)]
        if target == "stopped rank":
            number = signal.SIGSTOP
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return True


def _children(launcher: int, layout: Layout) -> dict[str, list[int]]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(text[text.rindex(")") + 2 :].split()[1])
    ranks = [launcher] if layout.ranks == 1 else [p for p in parents if parents[p] == launcher]
    return {"ranks": ranks, "loaders": [p for p in parents if parents[p] in ranks]}


def _left_after(folder: Path, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while (left := members(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(left)
