"""Tables of what reaching a validation loss costs, and of what is saved against others."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_eslm.reports.baselines import control_of, controls
from megatron_eslm.reports.groups import Group, on_common_seeds
from megatron_eslm.reports.quantities import QUANTITIES
from megatron_eslm.reports.tables import Table
from megatron_eslm.reports.targets import Reach

_HEADER = ["", *(q.title for q in QUANTITIES)]


def to_target_tables(
    groups: Sequence[Group], base: Group, best: Group | None, target: float, window: int
) -> list[Table]:
    """What each group needs to the target, and what it saves.

    Args:
        groups: groups whose losses are running means of `window` evaluations.
        base: the group that savings are first given against; one of `groups`.
        best: the best baseline, also one of them, or None.
        target: validation loss, nats.
        window: for the caption.
    """
    tables = [
        Table(
            f"To a validation loss of {target:.4f}",
            _HEADER,
            [[group.title, *_needs(group, target)] for group in groups],
            "Where a run first reaches the target, linear between evaluations: mean over seeds, in "
            "brackets lowest and highest. There is no mean unless every seed reaches it."
            + (f" The loss is a running mean of {window} evaluations." if window > 1 else ""),
        ),
        _saved(
            groups,
            base,
            target,
            f"Saved against {base.label} to {target:.4f}",
            f"Positive: less than {base.label} needs to the same loss; negative: more. Means over "
            "the seeds that both have.",
        ),
    ]
    if best is not None and best is not base:
        tables.append(
            _saved(
                groups,
                best,
                target,
                f"Saved against the best baseline, {best.label}, to {target:.4f}",
                f"Of the methods that are not ESLM, {best.label} has the lowest final loss, mean "
                f"over its seeds. Positive: less than {best.label} needs to the same loss.",
            )
        )
    if some := controls(groups):
        rows = [
            [
                f"{g.label} (against {control.label})" if len(some) > 1 else g.label,
                *_saves(g, control, target),
            ]
            for g in groups
            if g not in some and (control := control_of(g, groups)) is not None
        ]
        tables.append(
            Table(
                f"Saved against random selection to {target:.4f}",
                _HEADER,
                rows,
                "The control drops the same share at random; only what is saved against it is owed "
                "to the choice. Positive: less than it needs to the same loss.",
            )
        )
    return tables


def _saved(groups: Sequence[Group], other: Group, target: float, title: str, reading: str) -> Table:
    rows = [[g.label, *_saves(g, other, target)] for g in groups if g is not other]
    return Table(title, _HEADER, rows, reading)


def _needs(group: Group, target: float) -> list[str]:
    found = [(Reach.of(group, q.name, target), q.form) for q in QUANTITIES]
    return [r.spread.text(form) if r.spread else r.why_not for r, form in found]


def _saves(group: Group, other: Group, target: float) -> list[str]:
    cells = []
    group, other = on_common_seeds(group, other)
    for q in QUANTITIES:
        mine, theirs = (Reach.of(part, q.name, target) for part in (group, other))
        saved = mine.saved_on(theirs)
        if saved is not None:
            cells.append(f"{saved:+.1%}")
        elif mine.spread is None:
            cells.append(mine.why_not)
        else:
            cells.append(f"{other.label}: {theirs.why_not}")
    return cells
