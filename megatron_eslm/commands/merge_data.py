"""Merge preprocessed parts, or pairs, into one pair.

    megatron-eslm merge-data --output-prefix data/slimpajama
    megatron-eslm merge-data --input data/part1 data/part2 --output-prefix data/all

Without --input: the parts that `megatron-eslm preprocess --of N` made for this prefix, into one
pair or one for each domain. With it: Megatron .bin/.idx pairs, also those of Megatron-LM, one
after the other.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import Flag, check_fields


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What to merge, and into what."""

    output_prefix: Annotated[str, Flag(metavar="PREFIX")]
    """Path of the output without ending; as in preprocessing, if parts are merged."""

    input: Annotated[tuple[str, ...], Flag(metavar="PREFIX")] = ()
    """Pairs to merge, in this order, without their endings. Default: the parts of the output."""

    overwrite: bool = False
    """Replace existing output."""

    def __post_init__(self) -> None:
        check_fields(self)


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(MergeOptions, argv, __doc__)
    from pathlib import Path

    from megatron_eslm.data.merge_pairs import merge_pairs
    from megatron_eslm.data.parts.merge import merge_parts
    from megatron_eslm.files.output_prefix import output_prefix
    from megatron_eslm.files.stopped import stopped_by_signals

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        with stopped_by_signals():
            if options.input:
                prefix = output_prefix(options.output_prefix)
                merge_pairs(options.input, prefix, overwrite=options.overwrite)
                pairs = [prefix]
            else:
                pairs = merge_parts(Path(options.output_prefix), overwrite=options.overwrite)
    except OSError as error:
        raise ConfigError(
            f"--output-prefix {options.output_prefix} cannot be written: {error}. Free some space "
            "or choose another place."
        ) from error
    for pair in pairs:
        print(pair)
    return 0


if __name__ == "__main__":
    sys.exit(main())
