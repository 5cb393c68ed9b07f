#!/usr/bin/env python
"""Compare training runs: tables, curves and a page from their metrics files.

    python tools/compare_runs.py clm_s1.jsonl clm_s2.jsonl eslm_s1.jsonl random_s1.jsonl

Runs that differ by their seed alone are taken together. Writes report.md, report.png and
report.html.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_eslm.command_line import Parser, command
from megatron_eslm.files.output_prefix import output_prefix
from megatron_eslm.reports import curves
from megatron_eslm.reports.compare import compare, markdown
from megatron_eslm.reports.groups import group_runs
from megatron_eslm.reports.html import write_page
from megatron_eslm.reports.page import comparison_page
from megatron_eslm.reports.runs import read_run
from megatron_eslm.reports.tables import to_console


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 if the input cannot be used."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN.jsonl", help="files of --metrics-file")
    parser.add_argument(
        "--labels",
        nargs="+",
        help="a name for each run, runs of one name being seeds of one method; default: runs whose "
        "settings are the same but for the seed, named after their files",
    )
    parser.add_argument(
        "--target",
        type=float,
        help="validation loss to reach; default: what the baseline reaches at its end",
    )
    parser.add_argument(
        "--baseline",
        metavar="LABEL",
        help="what to compare with; default: the first method with --selection clm, or else the "
        "first of all",
    )
    parser.add_argument(
        "--output-prefix",
        default="report",
        help="writes PREFIX.md, PREFIX.png and PREFIX.html (%(default)s)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    report(args)
    return 0


def report(args: argparse.Namespace) -> None:
    """Read, compare, print and write."""
    groups = group_runs([read_run(file) for file in args.runs], args.labels)
    comparison = compare(groups, args.target, args.baseline)
    prefix = output_prefix(args.output_prefix)
    text, picture, page = (Path(f"{prefix}.{end}") for end in ("md", "png", "html"))
    flag = f"--output-prefix {args.output_prefix}"
    write_page(text, markdown(comparison, picture.name), flag)
    write_page(page, comparison_page(comparison), flag)
    curves.save(curves.draw(comparison.groups, comparison.target), picture)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in comparison.tables:
        console.print(to_console(table))
        print(f"{table.reading}\n")
    print(*comparison.notes, sep="\n")
    print(f"wrote {text}, {picture} and {page}")


if __name__ == "__main__":
    sys.exit(main())
