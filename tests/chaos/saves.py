"""SIGKILL at random moments of a save that goes on beside training."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.manifest import list_checkpoints
from megatron_eslm.errors import ConfigError
from tests.chaos import warm
from tests.chaos.damage import argv
from tests.chaos.outcome import Outcome, judge
from tests.chaos.table import Table, Verdict

LONGEST_SECONDS = 0.06
"""About how long a save of that model takes."""


def kill_saves(table: Table, data: list[str], folder: Path, times: int, rng: random.Random) -> None:
    """Kill a run while a draft is there; what is complete must be whole, and the run go on from it.

    Args:
        table: to count in.
        data: prefixes of the data.
        folder: to work in.
        times: how many.
        rng: chooses.
    """
    part, alone = "kills, in a save", folder / "alone"
    alone.mkdir(parents=True)
    ended = warm.run(argv(data, alone), alone)
    assert ended.code == 0, ended.err
    whole, done = Outcome.of(alone / "m.jsonl", alone / "save"), 0
    while done < times:
        job = folder / "job"
        shutil.rmtree(job, ignore_errors=True)
        job.mkdir()
        drafts, seconds = rng.randint(1, 5), rng.uniform(0.0, LONGEST_SECONDS)
        what = f"{1000 * seconds:.0f} ms after draft {drafts} appeared"
        complete = _kill(data, job, drafts, seconds)
        if complete is None:
            continue  # it had ended before
        done += 1
        try:
            found = find_checkpoint(job / "save").state().iteration if complete else 0
        except ConfigError as error:
            table.add(part, Verdict.LOST, f"{what}: {error}")
            continue
        if found != max(complete, default=0):
            table.add(part, Verdict.LOST, f"{what}: {found} is the newest of {complete}")
            continue
        verdict, why = judge(
            warm.run(argv(data, job), job), whole, job / "m.jsonl", job / "save", since=found
        )
        table.add(part, verdict, f"{what}: {why}")


def _kill(data: list[str], job: Path, drafts: int, seconds: float) -> list[int] | None:
    """Kill a run some time after its n-th draft appeared.

    Returns:
        Iterations of the checkpoints that are there; None where the run had ended before.
    """
    pid, seen = warm.start(argv(data, job), job), set[str]()
    while len(seen) < drafts:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return None
        seen |= {path.name for path in (job / "save").glob(".saving-*")}
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return [int(path.name[5:]) for path in list_checkpoints(job / "save")] if killed else None
