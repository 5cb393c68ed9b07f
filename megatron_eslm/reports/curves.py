"""Draw runs: validation loss against costs, and the panels that only some comparisons have."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.panels import Panel, loss_panels, more_panels
from megatron_eslm.reports.series import ceiling
from megatron_eslm.reports.theme import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p")
"""Not as many as there are colours or lines, so that what repeats a colour has another marker."""


def draw(groups: Sequence[Group], target: float | None, theme: Theme = LIGHT) -> Figure:
    """Draw a figure: five panels of losses, a legend, and below them `more_panels` if there are.

    Groups of several seeds are drawn as a line of means and a band from lowest to highest.

    Args:
        groups: groups of runs, each with evaluations.
        target: validation loss to mark with a horizontal line, or None.
        theme: colours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    more = more_panels(groups)
    # No pyplot: it keeps figures in module state and may look for a display.
    figure = Figure(
        figsize=(12, 10.5 if more else 7), dpi=150, layout="constrained", facecolor=theme.ground
    )
    FigureCanvasAgg(figure)
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=(2, 1))[:, 0] if more else [figure]
    axes = parts[0].subplots(2, 3, sharey=True).flatten()
    for place, panel in zip(axes, loss_panels(groups), strict=False):
        if target is not None:
            _mark(place, target, theme)
        _draw_panel(place, groups, panel, theme)
    for place in (axes[1], axes[2], axes[4]):
        place.set_ylabel("")
    axes[0].set_ylim(top=ceiling([run for group in groups for run in group.runs]))
    handles, labels = axes[0].get_legend_handles_labels()
    axes[5].axis("off")
    axes[5].legend(
        handles, labels, loc="upper left", frameon=False, labelcolor=theme.ink, handlelength=3
    )
    if more:
        grid = parts[1].add_gridspec(1, 3)
        for column, panel in enumerate(more):
            _draw_panel(parts[1].add_subplot(grid[column]), groups, panel, theme)
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


def _mark(axes: Axes, target: float, theme: Theme) -> None:
    """A horizontal line at the target."""
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


def _draw_panel(axes: Axes, groups: Sequence[Group], panel: Panel, theme: Theme) -> None:
    for number, (group, of_group) in enumerate(zip(groups, panel.bands, strict=True)):
        if of_group is None:
            continue
        xs = [x / panel.scale for x in of_group[0]]
        spreads = of_group[1]
        colour = theme.series[number % len(theme.series)]
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
    if not any(of_group and of_group[0] for of_group in panel.bands):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=theme.ink)
    axes.set_xlim(0, 1.05 * panel.largest / panel.scale or None)
    axes.set_xlabel(panel.xlabel, color=theme.ink)
    axes.set_ylabel(panel.ylabel, color=theme.ink)
    dress(axes, theme)


def dress(axes: Axes, theme: Theme) -> None:
    """Style grid, ticks and spines of a panel."""
    axes.set_facecolor(theme.ground)
    axes.grid(True, color=theme.faint)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
