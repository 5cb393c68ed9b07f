"""The panels of the picture, as numbers: losses and accuracy against costs, α over the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import Run
from megatron_eslm.reports.series import Band, band, unit
from megatron_eslm.reports.task_scores import mean_scores, shown_scores

_COSTS = (
    ("iteration", "iterations"),
    ("tokens_trained", "tokens trained on"),
    ("flops", "FLOPs executed"),
    ("flops_paper", "FLOPs, paper's count"),
    ("elapsed_seconds", "training time"),
)


@dataclass(frozen=True)
class Panel:
    """One line per group."""

    xlabel: str
    ylabel: str
    scale: float
    """What the numbers on the horizontal axis are divided by to be in the label's unit."""
    bands: list[Band | None]
    """In the order of the groups; None for a group that is not drawn here."""
    caption: str = ""
    """A phrase for readers of the page."""

    @property
    def largest(self) -> float:
        """The largest number on the horizontal axis, 0 if there is none."""
        return _largest(self.bands)


def loss_panels(groups: Sequence[Group]) -> list[Panel]:
    """Validation loss against each of five costs."""
    ylabel = "validation loss (nats per token)"
    return [
        _against(name, title, ylabel, [band(group, name) for group in groups])
        for name, title in _COSTS
    ]


def more_panels(groups: Sequence[Group]) -> list[Panel]:
    """Panels that only some comparisons have."""
    found = (alpha_panel(groups), accuracy_panel(groups))
    return [panel for panel in found if panel is not None]


def alpha_panel(groups: Sequence[Group]) -> Panel | None:
    """α over the iterations of the groups in which it changes; None if it does in no run."""
    changing = [any(map(_alpha_changes, group.runs)) for group in groups]
    if not any(changing):
        return None
    bands = [
        band(group, "iteration", "alpha") if changes else None
        for group, changes in zip(groups, changing, strict=True)
    ]
    caption = "α over the training, of the methods that change it"
    return _against("iteration", "iterations", "α", bands, caption)


def accuracy_panel(groups: Sequence[Group]) -> Panel | None:
    """Mean accuracy over the tasks against executed FLOPs; None without results of tasks."""
    scores = shown_scores([run for group in groups for run in group.runs])
    if not scores:
        return None
    bands = [
        band(group, "flops", "score", lambda run: mean_scores(run, scores)) for group in groups
    ]
    tasks = f"{len(scores)} tasks" if len(scores) > 1 else "1 task"
    caption = "accuracy of each checkpoint that was evaluated, mean over the tasks"
    return _against("flops", "FLOPs executed", f"accuracy ({tasks})", bands, caption)


def _alpha_changes(run: Run) -> bool:
    return len({r["alpha"] for r in run.records if r.get("alpha") is not None}) > 1


def _against(
    name: str, title: str, ylabel: str, bands: Sequence[Band | None], caption: str = ""
) -> Panel:
    """A panel whose horizontal axis is a field of the metrics."""
    scale, of = unit(name, _largest(bands))
    return Panel(f"{title} ({of})" if of else title, ylabel, scale, list(bands), caption)


def _largest(bands: Sequence[Band | None]) -> float:
    """The largest number on the horizontal axis, 0 if there is none."""
    return max((x for each in bands if each for x in each[0]), default=0.0)
