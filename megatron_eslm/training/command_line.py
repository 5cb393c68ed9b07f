"""Resolve the command line into a run, reading the files that it names."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_eslm.checkpoint.stored_shape import holds_nothing_yet, stored_run
from megatron_eslm.config.filler import MissingFlags
from megatron_eslm.config.run import RunConfig, parse_flags, resolve
from megatron_eslm.config.training_options import CheckpointOptions
from megatron_eslm.data.data_options import DataOptions


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
        return resolve(world_size=world_size, stored=shape, stored_scope=scope, **parsed)
    except MissingFlags:
        # Report bad files first: a missing flag may only follow from a wrong file.
        _check_data(parsed["data"])
        _check_checkpoint(parsed["checkpoint"])
        raise


def _check_data(options: DataOptions) -> None:
    # Local imports: before ranks connect, only refused runs need them.
    from megatron_eslm.data.index_file import read_index
    from megatron_eslm.data.meta import read_meta
    from megatron_eslm.data.source import parse_data_path, parse_split

    parse_split(options.split)
    for _, prefix in parse_data_path(options.data_path) if options.data_path else ():
        read_index(prefix)
        read_meta(prefix)


def _check_checkpoint(options: CheckpointOptions) -> None:
    from megatron_eslm.checkpoint.find import find_checkpoint

    if options.load is not None and not holds_nothing_yet(options):
        find_checkpoint(options.load)
