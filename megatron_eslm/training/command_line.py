"""Resolve the command line into a run, reading the files that it names."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from megatron_eslm.checkpoint.stored_shape import holds_nothing_yet, stored_run
from megatron_eslm.config.filler import MissingFlags
from megatron_eslm.config.run import RunConfig, parse_flags, resolve
from megatron_eslm.config.training_options import CheckpointOptions
from megatron_eslm.data.data_options import DEFAULT_SPLIT, DataOptions
from megatron_eslm.errors import ConfigError

logger = logging.getLogger(__name__)


def read_command_line(argv: Sequence[str], world_size: int) -> RunConfig:
    """Parse like `parse_run`, but fill missing flags from the checkpoint of --load.

    Every rank reads the checkpoint itself, because ranks are not connected yet.

    Raises:
        ConfigError: a flag, value, file or combination cannot be used.
    """
    parsed = parse_flags(argv)
    stored = stored_run(parsed["checkpoint"])
    shape, scope = (stored.shape, stored.scope) if stored is not None else (None, None)
    try:
        run = resolve(world_size=world_size, stored=shape, stored_scope=scope, **parsed)
    except MissingFlags:
        # Report bad files first: a missing flag may only follow from a wrong file.
        _check_data(parsed["data"])
        _check_checkpoint(parsed["checkpoint"])
        raise
    used = stored.used if stored is not None else (0, 0.0)
    if (steps := _steps_of_budget(run, used)) is None:
        return run
    parsed["training"] = dataclasses.replace(parsed["training"], train_iters=steps)
    parsed["given"] |= {"train_iters"}
    return resolve(world_size=world_size, stored=shape, stored_scope=scope, **parsed)


def _steps_of_budget(run: RunConfig, used: tuple[int, float]) -> int | None:
    """--train-iters as --train-flops shortens it; None if it does not, or not by a known number."""
    budget, limit = run.training.train_flops, run.training.train_iters
    if budget is None:
        return None
    if run.demo:
        raise ConfigError(
            "--train-flops needs --data-path or --train-data-path; it has no meaning for the demo."
        )
    from megatron_eslm.cost.budget import steps_of_budget
    from megatron_eslm.data.source import tokenizer_of

    steps = steps_of_budget(run, tokenizer_of(run.data).vocab_size, used)
    if steps is not None and steps > limit:
        logger.warning(
            "--train-iters %d ends before --train-flops %g, which is %d steps.",
            limit,
            budget,
            steps,
        )
    return steps if steps is not None and steps < limit else None


def _check_data(options: DataOptions) -> None:
    # Local imports: before ranks connect, only refused runs need them.
    from megatron_eslm.data.index_file import read_index
    from megatron_eslm.data.meta import read_meta
    from megatron_eslm.data.source import mixtures_of, parse_split

    parse_split(options.split or DEFAULT_SPLIT)
    for mixture in mixtures_of(options).values() if options.given else ():
        for _, prefix in mixture:
            read_index(prefix)
            read_meta(prefix)


def _check_checkpoint(options: CheckpointOptions) -> None:
    from megatron_eslm.checkpoint.find import find_checkpoint

    if options.load is not None and not holds_nothing_yet(options):
        find_checkpoint(options.load)
