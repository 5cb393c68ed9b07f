"""Self-contained HTML pages: one file, no scripts, nothing fetched, light and dark."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.tables import Table
from megatron_eslm.reports.theme import DARK, LIGHT, Theme

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 56rem; }
.muted, figcaption { color: var(--muted); font-size: .9rem; }
.notes { border-left: 3px solid var(--accent); margin: 1rem 0; padding: .1rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--faint); }
th { font-weight: 600; }
thead th, thead td { border-bottom: 2px solid var(--muted); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); }
@media (max-width: 40rem) {
  th:first-child { min-width: 40vw; white-space: normal; overflow-wrap: anywhere; }
}
figure { margin: 1.5rem 0; overflow-x: auto; }
img { width: 100%; min-width: 44rem; height: auto; display: block; }
"""


def escape(text: str) -> str:
    """Escape text for use anywhere in a page, attributes included."""
    return html.escape(text, quote=True)


def document(title: str, body: str, style: str = "") -> str:
    """Render a full page.

    Args:
        title: plain text.
        body: HTML with all text escaped.
        style: CSS besides the common one; it may use the variables ground, ink, faint, muted and
            accent, and `light-dark()`.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Forbid scripts and fetching, whatever text the page contains.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{_variables()}{_STYLE}{style}</style>\n"
        f"</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def table(table: Table) -> str:
    """Render a table under its title; it scrolls if the screen is too narrow."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    reading = f'<p class="muted">{escape(table.reading)}</p>' if table.reading else ""
    return (
        f"<section>\n<h2>{escape(table.title)}</h2>\n"
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody></table></div>\n{reading}</section>"
    )


def picture(light_svg: str, dark_svg: str, description: str) -> str:
    """Render a drawing that follows the reader's colour scheme."""

    def data(svg: str) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()

    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data(dark_svg)}">'
        f'<img src="{data(light_svg)}" alt="{escape(description)}"></picture>'
    )


def write_page(path: str | Path, page: str, flag: str) -> None:
    """Write a page; create its folder.

    Raises:
        ConfigError: the page cannot be written; the message names `flag`.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{flag}: {path} cannot be written: {error}. Choose another place."
        ) from error


def _variables() -> str:
    def of(theme: Theme) -> str:
        return (
            f"--ground: {theme.ground}; --ink: {theme.ink}; --faint: {theme.faint}; "
            f"--muted: {theme.muted}; --accent: {theme.series[0]};"
        )

    return (
        f":root {{ color-scheme: light dark; {of(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {of(DARK)} }} }}\n"
    )
