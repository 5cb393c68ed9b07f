"""What the lines of a picture go through: means and spreads over seeds, and units of the axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter

from megatron_eslm.reports.groups import Group, Spread
from megatron_eslm.reports.runs import Record, Run

Band = tuple[list[float], list[Spread]]
"""Mean of what is on the horizontal axis, and spread of what is on the vertical one."""

_FLOPS_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
_TIME_UNITS = ((2 * 3600.0, "hours", 3600.0), (10 * 60.0, "minutes", 60.0))
_COUNT_UNITS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def band(
    group: Group,
    x: str,
    y: str = "valid_loss",
    records: Callable[[Run], Sequence[Record]] = attrgetter("records"),
) -> Band:
    """Two fields of a group's records, at iterations where all its runs have finite numbers.

    Args:
        group: the runs.
        x: field whose mean over the runs is taken.
        y: field whose spread over the runs is taken.
        records: what to read of a run.
    """
    found = [
        {
            r["iteration"]: (float(r[x]), float(r[y]))
            for r in records(run)
            if _finite(r.get(x)) and _finite(r.get(y))
        }
        for run in group.runs
    ]
    common = sorted(set.intersection(*map(set, found)))
    xs = [sum(one[i][0] for one in found) / len(found) for i in common]
    return xs, [Spread.of([one[i][1] for one in found]) for i in common]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def ceiling(runs: Sequence[Run]) -> float | None:
    """Upper end of the loss axis; cuts off the drop in the first fifth of a run.

    Every run starts near ln(vocabulary). Drawn in full, the drop would squeeze the part where runs
    differ against the bottom. None (show everything) for runs with few evaluations.
    """
    late: list[float] = []
    for run in runs:
        start = 0.2 * run.records[-1]["iteration"]
        losses = [r["valid_loss"] for r in run.evaluations if r["iteration"] >= start]
        finite = [loss for loss in losses if math.isfinite(loss)]
        if len(finite) < 5:
            return None
        late += finite
    return max(late) + 0.08 * (max(late) - min(late))


def unit(name: str, largest: float) -> tuple[float, str]:
    """Divisor and name ("" if there is none) of a unit for a field of the metrics."""
    if name.startswith("flops"):
        return flops_unit(largest)
    if name == "elapsed_seconds":
        return time_unit(largest)
    if name == "iteration":
        return 1.0, ""
    return next(((size, unit) for size, unit in _COUNT_UNITS if largest >= 10 * size), (1.0, ""))


def flops_unit(largest: float) -> tuple[float, str]:
    """Divisor and name of a suitable unit for `largest` FLOPs."""
    return next(((size, name) for size, name in _FLOPS_UNITS if largest >= size), (1.0, "FLOP"))


def time_unit(largest_seconds: float) -> tuple[float, str]:
    """Divisor and name of a suitable unit for a time."""
    return next(
        ((size, name) for least, name, size in _TIME_UNITS if largest_seconds >= least),
        (1.0, "seconds"),
    )
