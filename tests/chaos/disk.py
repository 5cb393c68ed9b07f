"""A disk that takes no more, in the middle of a run."""

from __future__ import annotations

import random
import resource
import shutil
from pathlib import Path

from megatron_eslm.checkpoint.manifest import list_checkpoints
from tests.chaos import warm
from tests.chaos.damage import argv
from tests.chaos.outcome import Outcome, judge
from tests.chaos.table import Table, Verdict


def fill_disks(
    table: Table, data: list[str], whole: Outcome, folder: Path, times: int, rng: random.Random
) -> None:
    """Let every file end at a random size; the run must say so and go on once there is room.

    Args:
        table: to count in.
        data: prefixes that `whole` was trained on.
        whole: the uninterrupted run of `damage.argv`.
        folder: to work in.
        times: how many.
        rng: chooses.
    """
    part = "full disks"
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # From a few lines of a metrics file to a little less than a file of tensors.
        limit = int(10 ** rng.uniform(2.0, 5.5))
        words = argv(data, folder)

        def limited(words: list[str] = words, limit: int = limit) -> None:
            from megatron_eslm.training.main import main

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            main(words)

        ended = warm.wait(warm.fork(limited, folder, "full"), folder, "full")
        what = f"files end at {limit} bytes"
        # stderr ends there, too: nothing more can be said then.
        cut = len(ended.err) >= limit
        if "Traceback" in ended.err:
            table.add(part, Verdict.TRACEBACK, f"{what}: {ended.err[-1500:]}")
            continue
        if ended.code != 2 or not (cut or len(ended.errors) == 1):
            table.add(part, Verdict.LOST, f"{what}: exit code {ended.code}: {ended.err[-1500:]}")
            continue
        left = [path.name for path in list_checkpoints(folder / "save")]
        ended = warm.run(argv(data, folder), folder)
        verdict, why = judge(ended, whole, folder / "m.jsonl", folder / "save")
        if verdict is Verdict.REFUSED:
            verdict = Verdict.LOST  # there is room again: nothing may stand in the way
        table.add(part, verdict, f"{what} (left: {', '.join(left)}): {why}")
