"""Preprocessing that is killed: nothing that looks like data is left, and nothing else for long."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
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
        what, left, err = _kill(_start(text, prefix, folder), folder, rng, rng.uniform(0.5, 5.0))
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


def kill_parts(table: Table, folder: Path, times: int, rng: random.Random) -> None:
    """Kill or terminate preprocessing in parts at random moments; the same command goes on.

    Finished parts stay as they are, and in the end there are the bytes that one run writes.

    Args:
        table: to count in.
        folder: to work in.
        times: how many kills.
        rng: chooses.
    """
    part, key = "kills, preprocessing in parts", "meta.redpajama_set_name"
    (folder / "in").mkdir(parents=True)
    for n in range(60):
        lines = [
            {"text": f"{n} {i} {rng.random()} " * 20, "meta": {"redpajama_set_name": f"d{i % 3}"}}
            for i in range(1_000)
        ]
        (folder / "in" / f"{n:02d}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = _digests(_run_parts(folder, "alone", key))
    prefix, parts = folder / "killed", folder / "killed.parts"
    resumed = 0
    for _ in range(times):
        done = {path: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.json")}
        resumed += bool(done)
        process = _start(folder / "in", prefix, folder, "--split-key", key)
        if rng.random() < 0.8:  # in the work, however long the start takes
            while process.poll() is None and len(list(parts.glob("[0-9]*.json"))) <= len(done):
                time.sleep(0.002)
        what, left, err = _kill(process, folder, rng, rng.uniform(0.0, 0.2))
        if left:
            table.add(part, Verdict.LOST, f"{what}: {len(left)} processes stay behind")
        elif "Traceback" in err:
            table.add(part, Verdict.TRACEBACK, f"{what}: {err[-1500:]}")
        elif parts.exists() and any(path.stat().st_mtime_ns != at for path, at in done.items()):
            table.add(part, Verdict.LOST, f"{what}: a finished part was made again")
        elif not parts.exists() and prefix.exists() and _digests(prefix) != expected:
            table.add(part, Verdict.SILENT, f"{what}: other bytes than one run writes")
        else:
            table.add(part, Verdict.SURVIVED)
        if prefix.exists() and not parts.exists():  # it was done before the signal came
            shutil.rmtree(prefix)
    if _digests(_run_parts(folder, "killed", key)) != expected:
        table.add(part, Verdict.SILENT, "the last run: other bytes than one run writes")
    if times > 5 and not resumed:
        table.add(part, Verdict.LOST, "no kill came while parts were there")


def _run_parts(folder: Path, name: str, key: str) -> Path:
    process = _start(folder / "in", folder / name, folder, "--split-key", key)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder / name


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _kill(
    process: subprocess.Popen, folder: Path, rng: random.Random, seconds: float
) -> tuple[str, list[int], str]:
    """Send a signal after a while: which one, what stays behind and what was said."""
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    deadline = time.monotonic() + GONE_SECONDS
    while (left := members(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    stop(process, folder)
    return f"signal {number}", left, err


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
