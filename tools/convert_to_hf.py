#!/usr/bin/env python
"""Export a checkpoint as a Hugging Face folder and prove it by equal logits.

    python tools/convert_to_hf.py --load runs/eslm --output runs/eslm-hf

The folder appears only if transformers, loading it from disk, computes the same logits (1e-4).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from megatron_eslm.command_line import Parser, command
from megatron_eslm.interop.convert import LogitMismatch, checkpoint_to_folder


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if exported, 1 if the logits differ, 2 if the input cannot be used."""
    parser = Parser(__doc__)
    parser.add_argument("--load", required=True, help="folder of checkpoints")
    parser.add_argument("--tag", help="which checkpoint; default: the newest complete one")
    parser.add_argument("--output", required=True, help="Hugging Face folder to make")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export at --output"
    )
    parser.add_argument(
        "--without-tokenizer", action="store_true", help="export config and weights alone"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("megatron_eslm").setLevel(logging.INFO)
    try:
        difference = checkpoint_to_folder(
            args.load,
            args.output,
            args.tag,
            overwrite=args.overwrite,
            with_tokenizer=not args.without_tokenizer,
        )
    except LogitMismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"largest logit difference: {difference:.3g}")
    print(f"exported {args.load} to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
