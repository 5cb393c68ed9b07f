"""Compare training runs: tables, curves and a page from their metrics files.

    megatron-eslm compare-runs clm_s1.jsonl clm_s2.jsonl eslm_s1.jsonl random_s1.jsonl

Runs that differ by their seed alone are taken together. Writes report.md, report.png and
report.html.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.files.output_prefix import output_prefix
from megatron_eslm.limits import ONE_OR_MORE, POSITIVE, Flag, check_fields


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare, with what, and where to write."""

    runs: Annotated[tuple[str, ...], Flag(positional=True, metavar="RUN.jsonl")]
    """Files of --metrics-file."""

    labels: Annotated[tuple[str, ...], Flag(metavar="LABEL")] | None = None
    """A name for each run, runs of one name being seeds of one method; default: runs whose settings
    are the same but for the seed, named after their files."""

    results: Annotated[tuple[str, ...], Flag(metavar="RESULTS.jsonl")] = ()
    """Files of evaluate --output: tasks of the checkpoints of these runs. A run whose checkpoints
    are there is shown with them instead of its --eval-tasks."""

    target: float | None = None
    """Validation loss to reach; default: what the baseline reaches at its end."""

    window: Annotated[int, ONE_OR_MORE] = 1
    """Evaluations in the running mean that has to reach it."""

    budgets: Annotated[tuple[Annotated[float, POSITIVE], ...], Flag(metavar="FLOPS")] = ()
    """Budgets of FLOPs, such as 1e18, at which to read the losses, too."""

    baseline: Annotated[str, Flag(metavar="LABEL")] | None = None
    """What to compare with; default: the first method with --selection clm, or else the first of
    all."""

    output_prefix: Annotated[str, Flag(metavar="PREFIX")] = "report"
    """Writes PREFIX.md, PREFIX.png and PREFIX.html."""

    def __post_init__(self) -> None:
        check_fields(self)


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(CompareOptions, argv, __doc__)
    from megatron_eslm.reports import curves
    from megatron_eslm.reports.compare import compare, markdown
    from megatron_eslm.reports.groups import group_runs
    from megatron_eslm.reports.html import write_page
    from megatron_eslm.reports.page import comparison_page
    from megatron_eslm.reports.runs import read_run
    from megatron_eslm.reports.tables import print_tables
    from megatron_eslm.reports.task_results import read_task_results, with_task_results

    logging.basicConfig(format="%(levelname)s: %(message)s")
    runs = [read_run(file) for file in options.runs]
    runs = with_task_results(runs, read_task_results(options.results))
    groups = group_runs(runs, options.labels)
    comparison = compare(groups, options.target, options.baseline, options.window, options.budgets)
    prefix = output_prefix(options.output_prefix)
    text, picture, page = (Path(f"{prefix}.{end}") for end in ("md", "png", "html"))
    flag = f"--output-prefix {options.output_prefix}"
    write_page(text, markdown(comparison, picture.name), flag)
    write_page(page, comparison_page(comparison), flag)
    curves.save(curves.draw(comparison.groups, comparison.target), picture)
    print_tables(comparison.tables)
    print(*comparison.notes, sep="\n")
    print(f"wrote {text}, {picture} and {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
