#!/usr/bin/env python
"""Continue a text with a trained model.

    python tools/generate.py --load runs/eslm --prompt "def main(" --temperature 0.8

Without --prompt the text is read from standard input; an empty one starts a new document.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields

from megatron_eslm.command_line import Parser, command
from megatron_eslm.interop.generation import Sampling, generate, open_model


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 if the input cannot be used."""
    args = _parser().parse_args(argv)
    sampling = Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})
    prompts = args.prompt if args.prompt is not None else [sys.stdin.read().removesuffix("\n")]
    model, tokenizer = open_model(args.load, args.tag)
    for prompt in prompts:
        for number, text in enumerate(generate(model, tokenizer, prompt, sampling), start=1):
            if len(prompts) > 1 or sampling.num_samples > 1:
                print(f"--- {prompt!r}, sample {number}")
            print(text)
    return 0


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--load", required=True, help="folder of checkpoints, or an exported Hugging Face folder"
    )
    parser.add_argument("--tag", help="which checkpoint; default: the newest complete one")
    parser.add_argument(
        "--prompt", action="append", type=str, help="text to continue; may be repeated"
    )
    default = Sampling()
    for flag, kind, text in (
        ("max-new-tokens", int, "stop after this many tokens, or at the end of the document"),
        ("temperature", float, "0 always takes the likeliest token"),
        ("top-k", int, "sample among this many likeliest tokens; 0: all"),
        ("top-p", float, "sample among the fewest tokens of this total probability; 1: all"),
        ("num-samples", int, "continuations of each prompt"),
        ("seed", int, "same seed, same text"),
    ):
        parser.add_argument(
            f"--{flag}",
            type=kind,
            default=getattr(default, flag.replace("-", "_")),
            help=f"{text} (default: %(default)s)",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
