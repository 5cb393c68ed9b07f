"""Time several things side by side: in turns, in changing order, several times, one process.

A shared machine is now fast and now slow. Each repetition measures all of them one after the
other, so that a ratio is of neighbours; reported is the median over repetitions.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timings:
    """Seconds of each thing in each repetition."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over repetitions of one's seconds over another's in the same repetition."""
        return statistics.median(self.ratios(name, to))

    def ratios(self, name: str, to: str) -> list[float]:
        """The same of each repetition."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    repetitions: int,
    *,
    warm_ups: int = 1,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Call every case once a repetition, in an order drawn anew each time.

    Args:
        clock: seconds. time.process_time counts those of this process on a CPU, which says more
            where other processes want the same cores.
    """
    for _ in range(warm_ups):
        for call in cases.values():
            call()
    rng, names = random.Random(seed), list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repetitions):
        rng.shuffle(names)
        for name in names:
            _wait()
            begin = clock()
            cases[name]()
            _wait()
            seconds[name].append(clock() - begin)
    return Timings(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """What this runs on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def report(
    row: str,
    value: float,
    target: str,
    *,
    count: float | None = None,
    spread: list[float] | None = None,
    **more: Any,
) -> None:
    """Print one result as a JSON line and as a line of a Markdown table.

    Args:
        row: of the table in docs/benchmarks.md.
        value: what was measured.
        target: what it should be, in words.
        count: the same by the count of matrix products, the limit.
        spread: the value of each repetition.
        more: settings and further numbers, into the JSON line.
    """
    record = {"row": row, "value": round(value, 4), "target": target, "count": count, **more}
    if spread is not None:
        record["spread"] = [round(min(spread), 4), round(max(spread), 4)]
    record |= {
        "machine": machine(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(json.dumps(record), flush=True)
    limits = f" [{min(spread):.3f}, {max(spread):.3f}]" if spread else ""
    counted = "" if count is None else f"{count:.3f}"
    print(f"| {row} | {value:.3f}{limits} | {target} | {counted} |", flush=True)
