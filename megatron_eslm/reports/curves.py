"""Plot validation loss against cost, one panel per quantity."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.groups import Group, Spread
from megatron_eslm.reports.runs import Run
from megatron_eslm.reports.theme import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_FLOPS_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
_TIME_UNITS = ((2 * 3600.0, "hours", 3600.0), (10 * 60.0, "minutes", 60.0))
_COUNT_UNITS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))

PANELS = (
    ("iteration", "iterations"),
    ("tokens_trained", "tokens trained on"),
    ("flops", "FLOPs executed"),
    ("flops_paper", "FLOPs, paper's count"),
    ("elapsed_seconds", "training time"),
)


def draw(groups: Sequence[Group], target: float | None, theme: Theme = LIGHT) -> Figure:
    """Draw a figure of five panels and a legend.

    Groups of several seeds are drawn as a line of means and a band from lowest to highest.

    Args:
        groups: groups of runs, each with evaluations.
        target: validation loss to mark with a horizontal line, or None.
        theme: colours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps figures in module state and may look for a display.
    figure = Figure(figsize=(12, 7), dpi=150, layout="constrained", facecolor=theme.ground)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharey=True).flatten()
    for place, (name, title) in zip(axes, PANELS, strict=False):
        scale, unit = _unit(name, _largest(groups, name))
        _panel(place, groups, name, scale, target, theme)
        place.set_xlabel(f"{title} ({unit})" if unit else title, color=theme.ink)
        dress(place, theme)
    for place in (axes[0], axes[3]):
        place.set_ylabel("validation loss (nats per token)", color=theme.ink)
    axes[0].set_ylim(top=ceiling([run for group in groups for run in group.runs]))
    handles, labels = axes[0].get_legend_handles_labels()
    axes[5].axis("off")
    axes[5].legend(
        handles, labels, loc="upper left", frameon=False, labelcolor=theme.ink, handlelength=3
    )
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        # Omit the version, so that the same runs give the same bytes.
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise ConfigError(
            f"The picture {path} cannot be written: {error}. Choose another --output-prefix."
        ) from error


def svg(figure: Figure) -> str:
    """Render the figure as an SVG document, deterministically."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "curves"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def points(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Cost and validation loss of every evaluation at which both are finite numbers."""
    pairs = [
        (float(r[name]), float(r["valid_loss"]))
        for r in run.evaluations
        if r.get(name) is not None and math.isfinite(r["valid_loss"]) and math.isfinite(r[name])
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def band(group: Group, name: str) -> tuple[list[float], list[Spread]]:
    """Mean cost and spread of the loss, at iterations where all runs of a group have both."""
    found: list[dict[int, tuple[float, float]]] = []
    for run in group.runs:
        kept = {
            r["iteration"]: (float(r[name]), float(r["valid_loss"]))
            for r in run.evaluations
            if r.get(name) is not None and math.isfinite(r["valid_loss"]) and math.isfinite(r[name])
        }
        found.append(kept)
    common = sorted(set.intersection(*map(set, found)))
    costs = [sum(one[i][0] for one in found) / len(found) for i in common]
    return costs, [Spread.of([one[i][1] for one in found]) for i in common]


def ceiling(runs: Sequence[Run]) -> float | None:
    """Upper end of the loss axis; cuts off the initial drop in the first tenth of a run.

    Every run starts near ln(vocabulary). Drawn in full, the drop would squeeze the part where runs
    differ against the bottom. None (show everything) for runs with few evaluations.
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
    """Divisor and name of a suitable unit for `largest` FLOPs."""
    return next(((size, name) for size, name in _FLOPS_UNITS if largest >= size), (1.0, "FLOP"))


def time_unit(largest_seconds: float) -> tuple[float, str]:
    """Divisor and name of a suitable unit for a time."""
    return next(
        ((size, name) for least, name, size in _TIME_UNITS if largest_seconds >= least),
        (1.0, "seconds"),
    )


def _unit(name: str, largest: float) -> tuple[float, str]:
    if name.startswith("flops"):
        return flops_unit(largest)
    if name == "elapsed_seconds":
        return time_unit(largest)
    if name == "iteration":
        return 1.0, ""
    return next(((size, unit) for size, unit in _COUNT_UNITS if largest >= 10 * size), (1.0, ""))


def _largest(groups: Sequence[Group], name: str) -> float:
    runs = [run for group in groups for run in group.runs]
    return max((x for run in runs for x in points(run, name)[0]), default=0.0)


def _panel(
    axes: Axes,
    groups: Sequence[Group],
    name: str,
    scale: float,
    target: float | None,
    theme: Theme,
) -> None:
    if target is not None:
        axes.axhline(target, color=theme.muted, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            f"target {target:.3f}",
            (0.02, target),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            annotation_clip=True,
            color=theme.muted,
            fontsize=9,
        )
    drawn = False
    for number, group in enumerate(groups):
        costs, spreads = band(group, name)
        drawn = drawn or bool(costs)
        colour = theme.series[number % len(theme.series)]
        xs = [cost / scale for cost in costs]
        axes.plot(
            xs,
            [spread.mean for spread in spreads],
            label=group.title,
            color=colour,
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            markevery=max(1, len(xs) // 12),
            linewidth=1.8,
        )
        if len(group.runs) > 1:
            axes.fill_between(
                xs,
                [spread.low for spread in spreads],
                [spread.high for spread in spreads],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
    if not drawn:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=theme.ink)
    axes.set_xlim(left=0)


def dress(axes: Axes, theme: Theme) -> None:
    """Style grid, ticks and spines of a panel."""
    axes.set_facecolor(theme.ground)
    axes.grid(True, color=theme.faint)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
