"""Render a comparison of runs as one HTML page."""

from __future__ import annotations

from megatron_eslm.reports import curves, html
from megatron_eslm.reports.compare import Comparison
from megatron_eslm.reports.panels import more_panels
from megatron_eslm.reports.theme import DARK, LIGHT


def comparison_page(comparison: Comparison) -> str:
    """Render the full report: notes, curves and tables."""
    light, dark = (
        curves.svg(curves.draw(comparison.groups, comparison.target, theme))
        for theme in (LIGHT, DARK)
    )
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in comparison.notes)
    more = "; ".join(panel.caption for panel in more_panels(comparison.groups))
    below = f" Below: {more}." if more else ""
    shown = "Validation loss against iterations, tokens, FLOPs and seconds, by method."
    drawing = html.picture(light, dark, shown + below)
    caption = (
        "Validation loss against what it cost. Lines are means over seeds, bands reach from the "
        f"lowest to the highest seed.{below}"
    )
    parts = [
        f'<div class="notes">\n{notes}</div>' if notes else "",
        f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>",
        *map(html.table, comparison.tables),
    ]
    return html.document("Comparison of training runs", "\n".join(parts))
