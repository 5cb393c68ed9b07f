#!/usr/bin/env python
"""Score text with a reference model, once, for --selection rho1 --reference-losses NAME.

    python tools/score_reference.py --load runs/reference --data-path data/books data/web \
        --name self --seq-length 1024

Writes PREFIX.reference-NAME.npy (float16, the loss of predicting each token of PREFIX.bin) and a
.json beside it. Interrupted, the same command goes on from where it stopped. Prefixes can be
scored by several processes at a time, one for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from megatron_eslm.command_line import Parser, command
from megatron_eslm.data.options import DataOptions
from megatron_eslm.data.reference_losses import losses_path
from megatron_eslm.data.source import open_data
from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.bootstrap import single_process
from megatron_eslm.launch.device import prepare_device
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.selection.reference_options import is_plain_name

_TOKENIZER = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 if the input cannot be used."""
    args = _parser().parse_args(argv)
    with single_process():
        _score(args)
    return 0


def _score(args: argparse.Namespace) -> None:
    from megatron_eslm.frozen.reference import find_reference, load_reference
    from megatron_eslm.frozen.score import score_pair

    if not is_plain_name(args.name):
        raise ConfigError(
            f"--name {args.name!r} becomes a part of file names; use letters, digits, '-', '_'."
        )
    if args.batch_size < 1 or args.seq_length < 1:
        raise ConfigError(
            f"--batch-size {args.batch_size} and --seq-length {args.seq_length} must be 1 or more."
        )
    options = {name: getattr(args, name) for name in _TOKENIZER}
    # Everything that can be wrong, before the first token is scored.
    sources = [open_data(DataOptions(data_path=(p,), **options)) for p in args.data_path]
    for source in sources:
        found = find_reference("--load", args.load, source.tokenizer, args.tag)
    if args.seq_length > found.shape.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {args.seq_length} is more than the {found.shape.max_position_embeddings}"
            f" positions of the model in {args.load}; use at most that."
        )
    model = load_reference(found, build_mesh(), prepare_device(), getattr(torch, args.dtype))
    assert model is not None
    total = 0.0
    for prefix, source in zip(args.data_path, sources, strict=True):
        scored = score_pair(
            model,
            prefix,
            args.name,
            eod=source.tokenizer.eod,
            seq_length=args.seq_length,
            batch_size=args.batch_size,
            overwrite=args.overwrite,
            progress=lambda done, tokens, p=prefix: print(  # type: ignore[misc]
                f"{p}: {done:,} of {tokens:,} tokens", flush=True
            ),
        )
        total += scored.flops
        mean = f"mean loss {scored.total_loss / scored.tokens:.4f} nats, " if scored.tokens else ""
        print(
            f"{losses_path(prefix, args.name)}: {scored.tokens:,} tokens scored now, {mean}"
            f"{scored.flops:.4g} FLOPs"
        )
    print(f"{total:.4g} FLOPs, which no training run counts")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--load",
        required=True,
        metavar="DIR",
        help="folder of checkpoints, or a Hugging Face GPT-2 folder",
    )
    parser.add_argument("--tag", help="which checkpoint; default: the newest complete one")
    parser.add_argument(
        "--data-path", nargs="+", required=True, metavar="PREFIX", help="pairs without their ending"
    )
    parser.add_argument("--name", required=True, help="of the losses: --reference-losses NAME")
    parser.add_argument(
        "--seq-length",
        type=int,
        required=True,
        metavar="T",
        help="tokens predicted from one context; that of training",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="M",
        help="windows in a forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="in which the model computes (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew, whatever losses have this name"
    )
    for name in _TOKENIZER:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            help="as in training, for data without a stored tokenizer",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
