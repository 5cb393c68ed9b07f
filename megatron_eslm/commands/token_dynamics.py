"""How the losses of single tokens move over the checkpoints of a run (Rho-1, section 2.1).

    megatron-eslm token-dynamics --load runs/clm --data-path data/book data/github --samples 64

Writes dynamics.md, dynamics.png and dynamics.html: shares of the tokens whose loss stays low
(L→L), falls (H→L), rises (L→H) or stays high (H→H), with examples. Train with --keep-last 0, which
keeps every checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.output_prefix import output_prefix
from megatron_eslm.limits import Flag


@dataclass(frozen=True, kw_only=True)
class DynamicsOptions:
    """The run, what is scored, and where to write."""

    load: Annotated[str, Flag(metavar="DIR")]
    """Folder of a run's checkpoints."""

    iterations: tuple[int, ...] | None = None
    """Score these checkpoints only; default: all."""

    data_path: Annotated[tuple[str, ...], Flag(metavar="PREFIX")]
    """Score validation documents of these pairs."""

    samples: int = 64
    """Passages to score."""

    seq_length: int | None = None
    """Most tokens of a passage; default: the model's positions."""

    split: str | None = None
    """Which documents are for validation; default: those of the run that --load is of, since it was
    not trained on them."""

    threshold: float = 0.2
    """Change of the fitted line, in nats, from which a loss falls or rises."""

    output_prefix: Annotated[str, Flag(metavar="PREFIX")] = "dynamics"
    """Writes PREFIX.md, PREFIX.png and PREFIX.html."""


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(DynamicsOptions, argv, __doc__)
    from megatron_eslm.launch.bootstrap import single_process

    with single_process():
        report(options)
    return 0


def report(options: DynamicsOptions) -> None:
    """Score every checkpoint, classify, print and write."""
    import numpy as np

    from megatron_eslm.checkpoint.manifest import checkpoint_name
    from megatron_eslm.reports import curves, dynamics
    from megatron_eslm.reports.held_out import held_out
    from megatron_eslm.reports.html import write_page
    from megatron_eslm.reports.passages import validation_passages
    from megatron_eslm.reports.tables import print_tables
    from megatron_eslm.reports.token_scores import open_scoring_model, window_of

    def losses_at(iteration: int) -> np.ndarray:
        """float32 [N], of all tokens of the passages."""
        model = open_scoring_model(options.load, checkpoint_name(iteration))
        return np.concatenate([scores.loss for scores in model.score(passages)])

    iterations = chosen_iterations(options.load, options.iterations)
    newest = open_scoring_model(options.load, checkpoint_name(iterations[-1]))
    window = window_of([newest], options.seq_length)
    read = held_out([newest], options.split)
    passages = validation_passages(
        options.data_path,
        read.split,
        newest.tokenizer,
        window,
        options.samples,
        eod_mask_loss=read.eod_mask_loss,
    )
    losses = [losses_at(iteration) for iteration in iterations]
    found = dynamics.classify(iterations, np.stack(losses), options.threshold)
    title = f"Token dynamics of {Path(options.load).name}"
    tables = dynamics.tables(found, passages, newest.tokenizer)
    prefix = output_prefix(options.output_prefix)
    text, picture, page = (Path(f"{prefix}.{end}") for end in ("md", "png", "html"))
    flag = f"--output-prefix {options.output_prefix}"
    write_page(text, dynamics.markdown(tables, title, picture.name), flag)
    write_page(page, dynamics.page(found, tables, title), flag)
    curves.save(dynamics.draw(found), picture)
    print_tables(tables)
    print(f"wrote {text}, {picture} and {page}")


def chosen_iterations(load: str, wanted: Sequence[int] | None) -> list[int]:
    """Iterations of the checkpoints to score, ascending; at least enough for a course."""
    from megatron_eslm.checkpoint.manifest import list_checkpoints
    from megatron_eslm.reports import dynamics

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


if __name__ == "__main__":
    sys.exit(main())
