"""Compare training runs: what each method reached, and at what cost.

Iterations, tokens trained on, FLOPs executed, FLOPs by the paper's formula and wall-clock time have
separate columns. Savings are given against plain training, the best baseline and the random
control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.baselines import (
    best_baseline,
    control_of,
    controls,
    final_loss,
    share_trained,
)
from megatron_eslm.reports.budgets import budget_tables
from megatron_eslm.reports.groups import (
    Group,
    differing_settings,
    mixed_settings,
    on_common_seeds,
)
from megatron_eslm.reports.quantities import QUANTITIES, Format, count, loss
from megatron_eslm.reports.running_mean import averaged
from megatron_eslm.reports.runs import Run
from megatron_eslm.reports.tables import Table, to_markdown
from megatron_eslm.reports.targets import default_target
from megatron_eslm.reports.task_table import task_tables
from megatron_eslm.reports.to_target import to_target_tables

NO_CONTROL = (
    "No random-selection control among these runs: a gain here cannot be told from dropping the "
    "same share at random."
)


@dataclass(frozen=True)
class Comparison:
    """Content of a report of runs, before rendering."""

    groups: list[Group]
    baseline: Group
    """Reference of differences and savings."""
    target: float
    tables: list[Table]
    notes: list[str] = field(default_factory=list)


def compare(
    groups: Sequence[Group],
    target: float | None = None,
    baseline: str | None = None,
    window: int = 1,
    budgets: Sequence[float] = (),
) -> Comparison:
    """Compare groups of runs.

    Args:
        groups: two or more.
        target: validation loss (nats) to reach. Default: what the baseline reaches at its end.
        baseline: label of the group to compare with. Default: the first group of plain training
            (clm), else the first group.
        window: evaluations in the running mean that has to reach the target.
        budgets: FLOPs at which losses are read, none by default.

    Raises:
        ConfigError: fewer than two groups, an unknown baseline, or a run without evaluation.
    """
    if len(groups) < 2:
        raise ConfigError(
            f"{len(groups)} method given ({', '.join(group.label for group in groups)}); a "
            "comparison needs metrics files of two or more, or --labels that tell them apart."
        )
    for group in groups:
        for run in group.runs:
            if not run.evaluations:
                raise ConfigError(
                    f"The metrics file {run.path} has no valid_loss, so there is nothing to "
                    "compare. Train with --eval-interval below the number of iterations."
                )
    base = _baseline(groups, baseline)
    means = [averaged(group, window) for group in groups]
    mean_of = dict(zip(map(id, groups), means, strict=True))
    mean_base, best = mean_of[id(base)], best_baseline(groups)
    mean_best = mean_of[id(best)] if best is not None else None
    if target is None:
        target = default_target(means, mean_base)
    tables = [
        _results(groups, base),
        *task_tables(groups),
        _costs(groups),
        *to_target_tables(means, mean_base, mean_best, target, window),
        *budget_tables(groups, budgets),
        *_domains(groups),
        *_settings(groups),
    ]
    return Comparison(list(groups), base, target, tables, _notes(groups))


def markdown(comparison: Comparison, picture: str | None = None) -> str:
    """Render the report as Markdown, with a link to its picture if there is one."""
    parts = ["# Comparison of training runs\n"]
    parts += [f"{note}\n" for note in comparison.notes]
    if picture is not None:
        parts.append(f"![Validation loss against what it cost](<{picture}>)\n")
    parts += map(to_markdown, comparison.tables)
    return "\n".join(parts)


def perplexity(run: Run) -> float:
    """Perplexity per token at the last evaluation; infinite where it would overflow."""
    last = final_loss(run)
    return math.exp(last) if not last > 700 else math.inf


def best_loss(run: Run) -> float | None:
    """The lowest finite validation loss of a run."""
    losses = [r["valid_loss"] for r in run.evaluations if math.isfinite(r["valid_loss"])]
    return min(losses, default=None)


def _baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    if wanted is None:
        return next((group for group in groups if group.selection == "clm"), groups[0])
    for group in groups:
        if group.label == wanted:
            return group
    raise ConfigError(
        f"--baseline {wanted}: no such method; there are "
        f"{', '.join(group.label for group in groups)}."
    )


def _results(groups: Sequence[Group], base: Group) -> Table:
    some = controls(groups)
    rows = []
    for group in groups:
        control = control_of(group, groups)
        cells = [
            group.title,
            _cell(group, final_loss, loss),
            _difference(group, base),
            *([_difference(group, control)] if some else []),
            _cell(group, best_loss, loss),
            _cell(group, perplexity, "{:.2f}".format),
        ]
        rows.append(cells)
    return Table(
        "Validation loss at the end",
        [
            "",
            "final",
            f"against {base.label}",
            *(["against random"] if some else []),
            "best",
            "perplexity",
        ],
        rows,
        "Nats per token over the whole validation set, all tokens, whatever was trained on; "
        "perplexity is that of the final loss, per token of the tokenizer. Mean "
        "over seeds, in brackets the lowest and the highest seed (not shown where they print "
        "alike). Differences are between means over the seeds that both have; negative is "
        "better.",
    )


def _difference(group: Group, other: Group | None) -> str:
    if other is None or other is group:
        return "–"
    mine, theirs = (part.spread(final_loss) for part in on_common_seeds(group, other))
    assert mine is not None and theirs is not None
    return f"{mine.mean - theirs.mean:+.4f}"


def _costs(groups: Sequence[Group]) -> Table:
    def last(name: str) -> Callable[[Run], float | None]:
        return lambda run: run.last(name)

    def mean(name: str) -> Callable[[Run], float | None]:
        return lambda run: run.mean(name)

    columns: list[tuple[str, Callable[[Run], float | None], Format]] = [
        ("iterations", last("iteration"), count),
        ("tokens read", last("tokens"), count),
        *((q.title, last(q.name), q.form) for q in QUANTITIES[1:]),
        ("seconds per step", mean("step_seconds"), "{:.4g}".format),
        ("sequences kept", mean("kept_instances"), "{:.4f}".format),
        ("tokens kept", mean("kept_tokens"), "{:.4f}".format),
        ("skipped steps", last("nonfinite_steps"), count),
    ]
    return Table(
        "What the runs cost",
        ["", *(title for title, _, _ in columns)],
        [[g.label, *(_cell(g, read, form) for _, read, form in columns)] for g in groups],
        "Means over seeds, in brackets lowest and highest. Seconds are training alone, without "
        "evaluation and saving, on whatever machine a run had. Tokens kept are those of the kept "
        "sequences; both shares are means over the run.",
    )


def _cell(group: Group, read: Callable[[Run], float | None], form: Format) -> str:
    spread = group.spread(read)
    return spread.text(form) if spread else "n/a"


def _domains(groups: Sequence[Group]) -> list[Table]:
    """Table of final validation losses by domain, if any run reports them."""

    def final(run: Run) -> dict[str, float]:
        return run.evaluations[-1].get("valid_loss_by_domain") or {}

    names = list(dict.fromkeys(n for g in groups for run in g.runs for n in final(run)))
    if not names:
        return []

    def cell(group: Group, name: str) -> str:
        return _cell(group, lambda run: final(run).get(name), loss)

    return [
        Table(
            "Validation loss by domain at the end",
            ["", *names],
            [[group.title, *(cell(group, name) for name in names)] for group in groups],
            "Nats per token; mean over seeds, in brackets lowest and highest.",
        )
    ]


def _settings(groups: Sequence[Group]) -> list[Table]:
    different = differing_settings(groups)
    if not different:
        return []
    rows = [[g.label, *(_short(v[n]) for v in different.values())] for n, g in enumerate(groups)]
    return [Table("Settings that differ", ["", *different], rows)]


def _notes(groups: Sequence[Group]) -> list[str]:
    notes = []
    if not controls(groups):
        notes.append(NO_CONTROL)
    if len({frozenset(run.settings.get("seed") for run in group.runs) for group in groups}) > 1:
        notes.append(
            "The methods were not run with the same seeds. The differences and savings below are "
            "over the seeds that both methods have, if any: a seed decides initial weights and the "
            "order of data for both alike."
        )
    single = [group.label for group in groups if len(group.runs) == 1]
    if single:
        notes.append(
            f"One seed only: {', '.join(single)}. With a single seed a difference cannot be told "
            "from the luck of initial weights and order of data."
        )
    for group in groups:
        if mixed := mixed_settings(group):
            notes.append(f"The runs under {group.label} differ in more: {', '.join(mixed)}.")
        for run in group.runs:
            planned = run.settings.get("train_iters")
            if isinstance(planned, int) and run.iterations < planned:
                notes.append(
                    f"{run.path.name} ({group.label}) ended early, at {run.iterations} of "
                    f"{planned} iterations."
                )
    for group in groups:
        control = control_of(group, groups)
        if control is None or group.selection in ("clm", "random"):
            continue
        mine, theirs = share_trained(group), share_trained(control)
        if mine is not None and theirs is not None and abs(mine - theirs) > 0.02:
            notes.append(
                f"{group.label} trains on {mine:.1%} of the tokens; its control {control.label} "
                f"on {theirs:.1%}. No random control has the same share."
            )
    return notes


def _short(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
