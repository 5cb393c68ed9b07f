"""Validation loss against what it cost: FLOPs on the left, seconds on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with every common colour blindness; its yellow is left out,
# being too faint on white. Line and marker differ too, for print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_FLOPS_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
_TIME_UNITS = ((2 * 3600.0, "hours", 3600.0), (10 * 60.0, "minutes", 60.0))


def draw(
    runs: Sequence[Run], labels: Sequence[str], path: str | Path, target: float | None
) -> None:
    """Write a PNG with two panels.

    Args:
        runs: each with evaluations.
        labels: one for each run, for the legend.
        path: the file to write.
        target: validation loss to mark with a line across, or None.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps figures in module state and may look for a display.
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    scale, unit = flops_unit(_largest(runs, "flops"))
    _panel(left, runs, labels, "flops", scale, target)
    left.set_xlabel(f"training compute executed ({unit})")
    left.set_ylabel("validation loss (nats per token)")
    scale, unit = time_unit(_largest(runs, "elapsed_seconds"))
    _panel(right, runs, labels, "elapsed_seconds", scale, target)
    right.set_xlabel(f"training time ({unit})")
    right.legend(frameon=False)
    left.set_ylim(top=ceiling(runs))
    try:
        # Without the version in it, the same runs give the same bytes.
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise ConfigError(
            f"The picture {path} cannot be written: {error}. Choose another --output-prefix."
        ) from error


def points(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Cost and validation loss of every evaluation at which both are finite numbers."""
    pairs = [
        (float(r[name]), float(r["valid_loss"]))
        for r in run.evaluations
        if r.get(name) is not None and math.isfinite(r["valid_loss"]) and math.isfinite(r[name])
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def ceiling(runs: Sequence[Run]) -> float | None:
    """Upper end of the loss axis: what lies above is the fall of the first tenth of a run.

    Every run starts near ln(vocabulary); drawn in full, that fall would press the part in which
    runs differ against the bottom. None, to show everything, for runs of few evaluations.
    """
    late: list[float] = []
    for run in runs:
        start = 0.1 * run.records[-1]["iteration"]
        losses = [r["valid_loss"] for r in run.evaluations if r["iteration"] >= start]
        finite = [loss for loss in losses if math.isfinite(loss)]
        if len(finite) < 5:
            return None
        late += finite
    return max(late) + 0.08 * (max(late) - min(late))


def flops_unit(largest: float) -> tuple[float, str]:
    """Divisor and name of the unit in which `largest` FLOPs is a handy number."""
    return next(((size, name) for size, name in _FLOPS_UNITS if largest >= size), (1.0, "FLOP"))


def time_unit(largest_seconds: float) -> tuple[float, str]:
    """Divisor and name of the unit in which a time reads well."""
    return next(
        ((size, name) for least, name, size in _TIME_UNITS if largest_seconds >= least),
        (1.0, "seconds"),
    )


def _largest(runs: Sequence[Run], name: str) -> float:
    return max((x for run in runs for x in points(run, name)[0]), default=0.0)


def _panel(
    axes: Axes,
    runs: Sequence[Run],
    labels: Sequence[str],
    name: str,
    scale: float,
    target: float | None,
) -> None:
    if target is not None:
        axes.axhline(target, color="0.45", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            f"target {target:.3f}",
            (0.02, target),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            annotation_clip=True,
            color="0.35",
            fontsize=9,
        )
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        xs, ys = points(run, name)
        axes.plot(
            [x / scale for x in xs],
            ys,
            label=label,
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            markevery=max(1, len(xs) // 12),
            linewidth=1.8,
        )
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
