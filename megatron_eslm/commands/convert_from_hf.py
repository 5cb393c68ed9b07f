"""Make a checkpoint that `--load` starts from out of a Hugging Face model.

    megatron-eslm convert-from-hf --input gpt2 --save runs/gpt2

The checkpoint appears only if it computes the same logits as transformers does (1e-4).
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
class ImportOptions:
    """The model and the checkpoint."""

    input: Annotated[str, Flag(metavar="MODEL")]
    """Folder of a Hugging Face model, or its name on the hub."""

    save: Annotated[str, Flag(metavar="DIR")]
    """Folder of checkpoints to make."""

    make_vocab_size_divisible_by: Annotated[int, Flag(metavar="N")] = 128
    """Pad the vocabulary to a multiple of this."""


@command
def main(argv: Sequence[str]) -> int:
    """Return 0 if converted, 1 if the logits differ, 2 if the input cannot be used."""
    options = parse_options(ImportOptions, argv, __doc__)
    from megatron_eslm.interop.convert import folder_to_checkpoint

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("megatron_eslm").setLevel(logging.INFO)
    difference = folder_to_checkpoint(
        options.input, options.save, options.make_vocab_size_divisible_by
    )
    print(f"largest logit difference: {difference:.3g}")
    print(f"converted {options.input} to {options.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
