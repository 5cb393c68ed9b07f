"""From the command to the end of the first step, two ranks, warm caches.

python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.interleave import report

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    seconds = [start() for _ in range(args.repetitions + 1)][1:]  # the first fills the caches
    report(
        "seconds from the command to the first step, 2 ranks",
        statistics.median(seconds),
        "<= 12",
        spread=seconds,
        repetitions=args.repetitions,
    )


def start() -> float:
    """Seconds until the line of iteration 1, of the unadorned command with two ranks."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    command += [str(ROOT / "pretrain_gpt.py"), "--eslm-alpha", "0.1", "--eval-iters", "0"]
    command += ["--train-iters", "2", "--lr-warmup-iters", "1", "--log-interval", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        lines = []
        first = None
        for line in process.stdout:
            lines.append(line)
            if first is None and re.search(r"iteration +1/", line):
                first = time.perf_counter() - begin
    if process.returncode or first is None:
        raise SystemExit("".join(lines[-20:]))
    return first


if __name__ == "__main__":
    main()
