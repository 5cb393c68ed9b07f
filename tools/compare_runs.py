#!/usr/bin/env python
"""Compare training runs: a table and a picture from their metrics files.

    python tools/compare_runs.py clm.jsonl eslm.jsonl random.jsonl --output-prefix report

Writes report.md and report.png; relative numbers refer to the first run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports import curves
from megatron_eslm.reports.compare import compare, lines_below, to_console, to_markdown
from megatron_eslm.reports.runs import read_run


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 2 if the input cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN.jsonl", help="files of --metrics-file")
    parser.add_argument("--labels", nargs="+", help="names of the runs; default: the file names")
    parser.add_argument(
        "--target",
        type=float,
        help="validation loss to reach; default: the worst final one among the runs",
    )
    parser.add_argument(
        "--output-prefix", default="report", help="writes PREFIX.md and PREFIX.png (%(default)s)"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        report(args.runs, args.labels, args.target, args.output_prefix)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(
    files: list[str], labels: list[str] | None, target: float | None, output_prefix: str
) -> None:
    """Read, compare, print and write."""
    runs = [read_run(file) for file in files]
    comparison = compare(runs, labels or default_labels(files), target)
    markdown, picture = Path(f"{output_prefix}.md"), Path(f"{output_prefix}.png")
    try:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(to_markdown(comparison), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--output-prefix {output_prefix} cannot be written: {error}. Choose another place."
        ) from error
    curves.draw(runs, comparison.labels, picture, comparison.target)
    Console().print(to_console(comparison))
    print(*lines_below(comparison), sep="\n")
    print(f"wrote {markdown} and {picture}")


def default_labels(files: list[str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    paths = [Path(file).with_suffix("") for file in files]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path.name} #{number}" for number, path in enumerate(paths, start=1)]


if __name__ == "__main__":
    sys.exit(main())
