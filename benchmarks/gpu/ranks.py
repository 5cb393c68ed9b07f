"""The second stage, on two GPUs: layouts train the same model, and a lost rank is named.

Started by torchrun as `python -m benchmarks.gpu.ranks FOLDER` it trains the cases of its number of
ranks; the cases and methods are those of tests/training/parity.py.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.jobs import Job, endless, job_environment, job_row, torchrun
from benchmarks.gpu.row import Row, at_most
from benchmarks.gpu.setup import Setup
from tests.training.parity import METHODS, TOLERANCE, Case, compare, train_methods

CASES = [
    Case(),
    *(Case(dp=2, zero=zero) for zero in (0, 1, 2)),
    Case(tp=2),
    Case(tp=2, extra=("--sequence-parallel",)),
    Case(pp=2),
    Case(pp=2, zero=1),
    Case(dp=2, zero=3),  # last, because it leaves DeepSpeed in another state
]
SECONDS = 240.0
"""For all cases of a number of ranks."""
NAMED_SECONDS = 20.0
"""From the death of a rank to the end of the job."""
HANGS = """
import os, time
from megatron_eslm.engine.engine import Engine
from megatron_eslm.training.main import main

step = Engine.step

def step_or_hang(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.phases.iteration == 4:
        with self.phases("a loop without end"):
            time.sleep(1000)
    return step(self, *args, **kwargs)

Engine.step = step_or_hang
main()
"""
HANG_MINUTES = 0.1


def rows(setup: Setup) -> Iterator[Row]:
    """Of two ranks."""
    yield from _parity(setup)
    yield from _killed(setup)
    yield from _hung(setup)


def _parity(setup: Setup) -> Iterator[Row]:
    from tests.training.conftest import DOMAINS, make_domain

    folder = setup.folder / "parity"
    folder.mkdir()
    for name in DOMAINS:
        make_domain(folder / name, name, 400)
    outcomes = {**_trained(folder, 1), **_trained(folder, 2)}
    for case in CASES[1:]:
        found = {
            method: compare(folder, case, method, outcomes[case][method], outcomes[Case()][method])
            for method in METHODS
        }
        worst = max(max(d.loss, d.grad_norm) for d in found.values())
        others = [method for method, d in found.items() if not d.same_selection]
        note = f"worst of {', '.join(METHODS)}: losses in nats, relative gradient norms"
        yield Row.measured(16, f"{case} against one rank", worst, at_most(TOLERANCE), note)
        what = f"{case}: methods that kept other rows or tokens"
        yield Row.measured(16, what, len(others), at_most(0), ", ".join(others))


def _trained(folder: Path, ranks: int) -> dict:
    """Outcomes of the cases of some number of ranks."""
    log = folder / f"log-{ranks}.txt"
    command = [*torchrun(ranks), "-m", "benchmarks.gpu.ranks", str(folder)]
    with log.open("w") as file:
        code = subprocess.run(
            command, stdout=file, stderr=file, env=job_environment(), timeout=SECONDS
        ).returncode
    if code:
        raise RuntimeError(f"training on {ranks} ranks failed: {log.read_text()[-600:]}")
    return pickle.loads((folder / f"outcomes-{ranks}.pickle").read_bytes())


def _killed(setup: Setup) -> Iterator[Row]:
    with Job(setup.folder / "job-killed", 2, endless(setup)) as job:
        number, found = 17, []

        def check() -> str | None:
            job.until_iteration(3)
            job.rank(1).kill()
            seconds, said = job.end()
            found.append(seconds)
            named = "error: rank 1 (" in said and "died in" in said
            return None if named else f"not named: {job.last_words()}"

        yield from job_row(number, "a killed rank is named", check)
        for seconds in found:
            what = "seconds from its death to the end of the job"
            yield Row.measured(number, what, seconds, at_most(NAMED_SECONDS))


def _hung(setup: Setup) -> Iterator[Row]:
    script = setup.folder / "hangs.py"
    script.write_text(HANGS)
    flags = (*endless(setup), "--distributed-timeout-minutes", HANG_MINUTES)
    with Job(setup.folder / "job-hung", 2, flags, script) as job:

        def check() -> str | None:
            job.until_iteration(3)
            _, said = job.end()
            named = "error: rank 1 (" in said and 'has been in "a loop without end"' in said
            return None if named else f"not named: {job.last_words()}"

        yield from job_row(18, "a hung rank is named before NCCL aborts", check)


def main() -> None:
    """Train the cases of this number of ranks, and leave their outcomes in the folder."""
    from megatron_eslm.launch.bootstrap import init_distributed, leave
    from tests.training.conftest import DOMAINS

    folder, ranks = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    init_distributed()
    data = [str(folder / name) for name in DOMAINS]
    cases = [case for case in CASES if case.world == ranks]
    outcomes = {case: train_methods(data, folder, case) for case in cases}
    if os.environ["RANK"] == "0":
        (folder / f"outcomes-{ranks}.pickle").write_bytes(pickle.dumps(outcomes))
    leave()


if __name__ == "__main__":
    main()
