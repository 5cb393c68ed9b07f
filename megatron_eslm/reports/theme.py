"""Colours of pictures and pages, light and dark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours of one background."""

    name: str
    ground: str
    ink: str
    faint: str
    """Grid lines and borders."""
    muted: str
    """Secondary text."""
    series: tuple[str, ...]


# Okabe and Ito's palette, distinguishable with all common colour blindness, without its yellow,
# which is too faint on white. Lines and markers differ too, for print without colour.
LIGHT = Theme(
    "light",
    ground="#ffffff",
    ink="#1b1d22",
    faint="#dddfe4",
    muted="#5b606b",
    series=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
)
# The same hues, brighter.
DARK = Theme(
    "dark",
    ground="#15171c",
    ink="#e7e9ee",
    faint="#343842",
    muted="#a3a9b6",
    series=("#4FB3F0", "#FF8A3D", "#2ECC9B", "#E59CC6", "#F2BE4A", "#A8DCFA", "#FFFFFF"),
)
THEMES = (LIGHT, DARK)
