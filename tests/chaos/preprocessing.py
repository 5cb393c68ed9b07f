"""Preprocessing that is killed: nothing that looks like data is left, and nothing else for long."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos.table import Table, Verdict
from tests.training.test_command_line import ROOT, environment, members, stop

GONE_SECONDS = 20.0


def _command(text: Path, prefix: Path) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(text)),
        *("--output-prefix", str(prefix), "--tokenizer-type", "ByteTokenizer", "--workers", "2"),
        "--append-eod",
    ]


def kill_preprocessing(table: Table, folder: Path, times: int, rng: random.Random) -> None:
    """Kill or terminate the parent at random moments; the last run must write what one alone does.

    Args:
        table: to count in.
        folder: to work in.
        times: how many kills.
        rng: chooses.
    """
    part = "kills, preprocessing"
    folder.mkdir(parents=True)
    text, prefix = folder / "a.txt", folder / "out" / "a"
    text.write_text("\n\n".join(f"{n} some text {rng.random()}" for n in range(120_000)))
    expected = _run_whole(text, folder / "alone")
    for _ in range(times):
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        process = _start(text, prefix, folder)
        time.sleep(rng.uniform(0.5, 5.0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
        what = f"signal {number}"
        deadline = time.monotonic() + GONE_SECONDS
        while (left := members(folder)) and time.monotonic() < deadline:
            time.sleep(0.05)
        stop(process, folder)
        written = sorted(path.name for path in prefix.parent.glob("a.*"))
        if left:
            table.add(part, Verdict.LOST, f"{what}: {len(left)} processes stay behind")
        elif "Traceback" in err:
            table.add(part, Verdict.TRACEBACK, f"{what}: {err[-1500:]}")
        elif "a.idx" in written and _digest(prefix) != expected:
            table.add(part, Verdict.SILENT, f"{what}: {written} differ from what one run writes")
        else:
            table.add(part, Verdict.SURVIVED)
        for path in prefix.parent.glob("a.*"):  # it was done before the signal came
            path.unlink() if path.is_file() else None
    _check_last(table, part, text, prefix, folder, expected)


def _check_last(
    table: Table, part: str, text: Path, prefix: Path, folder: Path, expected: str
) -> None:
    process = _start(text, prefix, folder, "--overwrite")
    _, err = process.communicate(timeout=120)
    hidden = [path.name for path in prefix.parent.iterdir() if path.name.startswith(".")]
    if process.returncode != 0 or _digest(prefix) != expected or hidden:
        table.add(part, Verdict.LOST, f"the last run: {hidden} {err[-1500:]}")


def _start(text: Path, prefix: Path, folder: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*_command(text, prefix), *more],
        env=environment(str(folder)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _run_whole(text: Path, prefix: Path) -> str:
    process = _start(text, prefix, prefix.parent)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return _digest(prefix)


def _digest(prefix: Path) -> str:
    digest = hashlib.sha256()
    for end in ("bin", "idx"):
        digest.update(Path(f"{prefix}.{end}").read_bytes())
    return digest.hexdigest()
