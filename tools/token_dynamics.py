#!/usr/bin/env python
"""How the losses of single tokens move over the checkpoints of a run (Rho-1, section 2.1).

    python tools/token_dynamics.py --load runs/clm --data-path data/book data/github --samples 64

Writes dynamics.md, dynamics.png and dynamics.html: shares of the tokens whose loss stays low
(L→L), falls (H→L), rises (L→H) or stays high (H→H), with examples. Train with --keep-last 0, which
keeps every checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_eslm.checkpoint.manifest import checkpoint_name, list_checkpoints
from megatron_eslm.command_line import Parser, command
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.output_prefix import output_prefix
from megatron_eslm.launch.bootstrap import single_process
from megatron_eslm.reports import curves, dynamics
from megatron_eslm.reports.held_out import held_out
from megatron_eslm.reports.html import write_page
from megatron_eslm.reports.passages import Passage, validation_passages
from megatron_eslm.reports.tables import to_console
from megatron_eslm.reports.token_scores import open_scoring_model, window_of


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 if the input cannot be used."""
    args = _parser().parse_args(argv)
    with single_process():
        report(args)
    return 0


def report(args: argparse.Namespace) -> None:
    """Score every checkpoint, classify, print and write."""
    iterations = chosen_iterations(args.load, args.iterations)
    newest = open_scoring_model(args.load, checkpoint_name(iterations[-1]))
    window = window_of([newest], args.seq_length)
    read = held_out([newest], args.split)
    passages = validation_passages(
        args.data_path,
        read.split,
        newest.tokenizer,
        window,
        args.samples,
        eod_mask_loss=read.eod_mask_loss,
    )
    losses = [score(args.load, iteration, passages) for iteration in iterations]
    found = dynamics.classify(iterations, np.stack(losses), args.threshold)
    title = f"Token dynamics of {Path(args.load).name}"
    tables = dynamics.tables(found, passages, newest.tokenizer)
    prefix = output_prefix(args.output_prefix)
    text, picture, page = (Path(f"{prefix}.{end}") for end in ("md", "png", "html"))
    flag = f"--output-prefix {args.output_prefix}"
    write_page(text, dynamics.markdown(tables, title, picture.name), flag)
    write_page(page, dynamics.page(found, tables, title), flag)
    curves.save(dynamics.draw(found), picture)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(to_console(table))
        print(f"{table.reading}\n")
    print(f"wrote {text}, {picture} and {page}")


def chosen_iterations(load: str, wanted: list[int] | None) -> list[int]:
    """Iterations of the checkpoints to score, ascending; at least enough for a course."""
    there = sorted(
        int(folder.name.removeprefix("iter_")) for folder in list_checkpoints(Path(load))
    )
    chosen = there if wanted is None else sorted(set(wanted))
    missing = [str(iteration) for iteration in chosen if iteration not in there]
    if missing:
        raise ConfigError(
            f"--iterations {' '.join(missing)}: {load} has no such checkpoint, only "
            f"{', '.join(map(str, there)) or 'none'}."
        )
    dynamics.check_checkpoints(chosen)
    return chosen


def score(load: str, iteration: int, passages: list[Passage]) -> np.ndarray:
    """float32 [N], losses of all tokens of the passages at one checkpoint."""
    model = open_scoring_model(load, checkpoint_name(iteration))
    return np.concatenate([scores.loss for scores in model.score(passages)])


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--load", required=True, help="folder of a run's checkpoints")
    parser.add_argument(
        "--iterations", type=int, nargs="+", help="score these checkpoints only; default: all"
    )
    parser.add_argument(
        "--data-path",
        nargs="+",
        metavar="PREFIX",
        required=True,
        help="score validation documents of these pairs",
    )
    parser.add_argument("--samples", type=int, default=64, help="passages to score (%(default)s)")
    parser.add_argument(
        "--seq-length", type=int, help="most tokens of a passage; default: the model's positions"
    )
    parser.add_argument(
        "--split",
        help="which documents are for validation; default: those of the run that --load is of, "
        "since it was not trained on them",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.2,
        help="change of the fitted line, in nats, from which a loss falls or rises (%(default)s)",
    )
    parser.add_argument(
        "--output-prefix",
        default="dynamics",
        help="writes PREFIX.md, PREFIX.png and PREFIX.html (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
