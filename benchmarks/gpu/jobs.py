"""Row 12: jobs under torchrun that are told to stop, or lose a process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psutil

from benchmarks.gpu.row import Row, exactly
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.training import TINY, Flags, data_flags

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0


def torchrun(ranks: int) -> list[str]:
    """The launcher, for a script or -m and a module."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*words, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def job_environment() -> dict[str, str]:
    """Of the launcher."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Job:
    """A training of `ranks` processes under torchrun; ended with the `with` block."""

    def __init__(self, folder: Path, ranks: int, flags: Flags, script: Path | None = None) -> None:
        folder.mkdir()
        self.metrics, self.log = folder / "metrics.jsonl", folder / "log.txt"
        command = [*torchrun(ranks), str(script or ROOT / "pretrain_gpt.py"), *map(str, flags)]
        command += ["--metrics-file", str(self.metrics)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=job_environment(), start_new_session=True
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in [*self.ranks(), *self.loaders()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def ranks(self) -> list[psutil.Process]:
        """Training processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children()
        return []

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        return next(p for p in self.ranks() if p.environ().get("RANK") == str(number))

    def loaders(self) -> list[psutil.Process]:
        """Loader processes of all ranks."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child for rank in self.ranks() for child in rank.children()]
        return []

    def until_iteration(self, number: int) -> None:
        """Wait until a step is done; RuntimeError if it never is."""
        deadline = time.monotonic() + START_SECONDS
        wanted = f'"iteration": {number},'
        while not (self.metrics.exists() and wanted in self.metrics.read_text()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no iteration {number}: {self.last_words()}")
            time.sleep(0.1)

    def end(self, seconds: float = 60.0) -> tuple[float, str]:
        """Wait for the end; (seconds that it took, what the job said)."""
        begin = time.monotonic()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"still there after {seconds:.0f} s: {self.last_words()}") from None
        return time.monotonic() - begin, self.log.read_text()

    def last_words(self) -> str:
        """The last line that is an error, or the last line."""
        lines = self.log.read_text().strip().splitlines() or ["it said nothing"]
        return next((line for line in lines if line.startswith("error: ")), lines[-1])


def endless(setup: Setup) -> Flags:
    """A small run that does not end by itself."""
    more = (
        "--no-compile",
        "--train-iters",
        100_000,
        "--max-epochs",
        1_000_000,
        "--log-interval",
        1,
    )
    return (*data_flags(setup), *TINY[:-2], *more, "--num-workers", 1, "--eval-iters", 0)


def rows(setup: Setup) -> Iterator[Row]:
    """Of jobs of one rank; all start at once."""
    flags, save = endless(setup), setup.folder / "stopped"
    with (
        Job(setup.folder / "job-stop", 1, (*flags, "--save", save)) as stopped,
        Job(setup.folder / "job-loader", 1, flags) as bereft,
    ):
        what = "SIGTERM to a rank saves and stops"
        yield from job_row(12, what, lambda: _stop(stopped, save))
        yield from job_row(12, "a killed loader is named", lambda: _kill_loader(bereft))


def job_row(number: int, what: str, check: Callable[[], str | None]) -> Iterator[Row]:
    """A row of whether a check finds nothing wrong."""
    try:
        wrong = check()
    except (RuntimeError, StopIteration) as error:
        wrong = str(error) or "no such process"
    yield Row.measured(number, what, wrong is None, exactly(1), wrong or "")


def _stop(job: Job, save: Path) -> str | None:
    job.until_iteration(3)
    job.rank(0).send_signal(signal.SIGTERM)
    _, said = job.end()
    found = re.search(r"SIGTERM: stopped after iteration (\d+)", said)
    if found is None:
        return f"no word of a stop: {job.last_words()}"
    folder = save / f"iter_{int(found[1]):07d}"
    if not (folder / "manifest.json").exists():
        return f"no checkpoint {folder.name}"
    code = re.search(r"exitcode\s*:\s*(-?\d+)", said)
    if code is None or int(code[1]) != 128 + signal.SIGTERM:
        return f"exit code {code and code[1]} instead of {128 + signal.SIGTERM}"
    return None


def _kill_loader(job: Job) -> str | None:
    job.until_iteration(3)
    (loader,) = job.loaders()
    loader.kill()
    _, said = job.end()
    if f"pid {loader.pid}" not in said or job.process.returncode == 0:
        return f"not named: {job.last_words()}"
    return None
