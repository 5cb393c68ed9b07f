"""Does it work on a GPU, and how fast: rows with bounds, a table and a JSON.

    make gpu                          # one GPU, below ten minutes
    make gpu GPUS=2                   # a second stage: layouts over two GPUs, a killed, a hung rank
    python -m benchmarks.gpu --toy    # small shapes and bounds, on any machine: tests the script

The exit code is 1 if a bound is missed or a row cannot be measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import torch

from benchmarks.gpu import curve, device, head, jobs, resume, same_numbers, saving, speed, waits
from benchmarks.gpu.process import WorkFailed, in_process
from benchmarks.gpu.row import TABLE_HEAD, Row, missed
from benchmarks.gpu.setup import Setup
from benchmarks.interleave import machine
from megatron_eslm.launch.bootstrap import quiet_imports
from megatron_eslm.launch.device import driver_version, prepare_device, unusable_gpu

Rows = Callable[[Setup], Iterator[Row]]


def _isolated(rows: Rows, seconds: float) -> Rows:
    return lambda setup: in_process(rows, setup, seconds=seconds)


GROUPS: dict[str, tuple[tuple[int, ...], Rows]] = {
    "device": ((1,), _isolated(device.rows, 60.0)),
    "head": ((2, 3), _isolated(head.rows, 180.0)),
    "same": ((4, 13, 14), same_numbers.rows),
    "curve": ((5,), curve.rows),
    "speed": ((6, 7, 9), speed.rows),
    "waits": ((8,), _isolated(waits.rows, 90.0)),
    "resume": ((10, 11), resume.rows),
    "saving": ((15,), saving.rows),
    "jobs": ((12,), jobs.rows),
}
"""Numbers of the rows and what measures them; what uses the device does so in other processes."""


def _ranks(setup: Setup) -> Iterator[Row]:
    from benchmarks.gpu import ranks  # needs the tests

    return ranks.rows(setup)


SECOND_STAGE: dict[str, tuple[tuple[int, ...], Rows]] = {"ranks": ((16, 17, 18), _ranks)}


def measure(
    names: list[str], setup: Setup, groups: dict[str, tuple[tuple[int, ...], Rows]]
) -> tuple[list[Row], dict[str, float]]:
    """Print and return rows of some groups, and the seconds that each group took."""
    found: list[Row] = []
    seconds: dict[str, float] = {}
    print(TABLE_HEAD, flush=True)
    for name in names:
        numbers, rows = groups[name]
        begin = time.monotonic()
        before = len(found)
        try:
            for row in rows(setup):
                found.append(row)
                print(row, flush=True)
        except Exception as error:  # one row must not hide the others
            if not isinstance(error, WorkFailed):
                traceback.print_exc()
            done = {row.number for row in found[before:]}
            number = next((n for n in numbers if n not in done), numbers[-1])
            row = Row.failed(number, name, f"{type(error).__name__}: {error}")
            found.append(row)
            print(row, flush=True)
        seconds[name] = round(time.monotonic() - begin, 1)
    return found, seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="small; the default without a GPU")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="these groups of rows")
    parser.add_argument(
        "--gpus", type=int, choices=(1, 2), default=1, help="2: the second stage (%(default)s)"
    )
    parser.add_argument("--json", default="gpu.json", metavar="FILE", help="(%(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of an unknown device")
    args = parser.parse_args()
    if (why := unusable_gpu()) is not None:
        print(f"error: {why}.", file=sys.stderr)
        return 2
    cuda = torch.cuda.is_available()
    groups = GROUPS if args.gpus == 1 else SECOND_STAGE
    if cuda and torch.cuda.device_count() < args.gpus:
        print(f"error: --gpus {args.gpus}: this machine shows fewer.", file=sys.stderr)
        return 2
    if not cuda:
        quiet_imports()
        prepare_device()
        import megatron_eslm.training.build  # noqa: F401  # before processes are forked
    toy = args.toy or not cuda
    about = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "toy": toy,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        setup = Setup(toy, cuda, Path(folder), args.peak_tflops)
        found, seconds = measure(args.only or list(groups), setup, groups)
    wrong, total = missed(found), time.monotonic() - begin
    record = {**about, "seconds": seconds, "rows": [row.to_dict() for row in found]}
    Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    skipped = sum(row.state == "not run" for row in found)
    print(
        f"\n{len(found)} lines, {len(wrong)} missed, {skipped} not run, {total:.0f} s; {args.json}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
