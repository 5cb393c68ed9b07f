#!/usr/bin/env python
"""Make a checkpoint that `--load` starts from out of a Hugging Face GPT-2.

    python tools/convert_from_hf.py --input gpt2 --save runs/gpt2

The checkpoint appears only if it computes the same logits as transformers does (1e-4).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from megatron_eslm.command_line import Parser, command
from megatron_eslm.interop.convert import LogitMismatch, folder_to_checkpoint


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if converted, 1 if the logits differ, 2 if the input cannot be used."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--input", required=True, help="folder of a Hugging Face GPT-2, or its name on the hub"
    )
    parser.add_argument("--save", required=True, help="folder of checkpoints to make")
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="pad the vocabulary to a multiple of this (default: 128)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("megatron_eslm").setLevel(logging.INFO)
    try:
        difference = folder_to_checkpoint(args.input, args.save, args.make_vocab_size_divisible_by)
    except LogitMismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"largest logit difference: {difference:.3g}")
    print(f"converted {args.input} to {args.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
