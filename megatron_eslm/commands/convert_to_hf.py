"""Export a checkpoint as a Hugging Face folder and prove it by equal logits.

    megatron-eslm convert-to-hf --load runs/eslm --output runs/eslm-hf

The folder appears only if transformers, loading it from disk, computes the same logits (1e-4).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.limits import Flag


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The checkpoint and the folder."""

    load: Annotated[str, Flag(metavar="DIR")]
    """Folder of checkpoints."""

    tag: str | None = None
    """Which checkpoint; default: the newest complete one."""

    output: Annotated[str, Flag(metavar="DIR")]
    """Hugging Face folder to make."""

    overwrite: bool = False
    """Replace an earlier export at --output."""

    without_tokenizer: bool = False
    """Export config and weights alone."""


@command
def main(argv: Sequence[str]) -> int:
    """Return 0 if exported, 1 if the logits differ, 2 if the input cannot be used."""
    options = parse_options(ExportOptions, argv, __doc__)
    from megatron_eslm.interop.convert import checkpoint_to_folder

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("megatron_eslm").setLevel(logging.INFO)
    difference = checkpoint_to_folder(
        options.load,
        options.output,
        options.tag,
        overwrite=options.overwrite,
        with_tokenizer=not options.without_tokenizer,
    )
    print(f"largest logit difference: {difference:.3g}")
    print(f"exported {options.load} to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
