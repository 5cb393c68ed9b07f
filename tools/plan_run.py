#!/usr/bin/env python
"""Predict memory, communication and step time of layouts on machines that you do not have.

    python tools/plan_run.py --model-size 1.5B --gpus 32 --gpu a100-80g \
        --interconnect infiniband-hdr --alpha 0.1

Prints the best of all layouts that train and fit, and everything about the first. --table prints
the tables of docs/scaling.md instead. Nothing is measured: docs/scaling.md says what is assumed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from megatron_eslm.command_line import Parser, command
from megatron_eslm.errors import ConfigError
from megatron_eslm.planning.hardware import (
    ACCELERATORS,
    INTRA_LINKS,
    NETWORKS,
    Machine,
    Overrides,
    assumptions,
    machine_of,
)
from megatron_eslm.planning.report import plans_values, report
from megatron_eslm.planning.request import SELECTIONS, SIZES, Request
from megatron_eslm.planning.search import Pins, search
from megatron_eslm.planning.tables import TABLES

PINNED = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "micro_batch_size",
    "zero_stage",
    "activation_checkpoint_interval",
)
OVERRIDDEN = (
    ("peak_tflops", "dense peak of a GPU in bf16"),
    ("memory_gib", "memory of a GPU"),
    ("efficiency", "share of the peak that large matrix products reach"),
    ("intra_gb_per_s", "bandwidth of a GPU to others of its machine, one direction"),
    ("inter_gb_per_s", "bandwidth of a machine to others, all its ports, one direction"),
    ("latency_us", "a message between machines"),
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 if the input cannot be used."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    print(_output(args))
    return 0


def _output(args: argparse.Namespace) -> str:
    overrides = Overrides(**{name: getattr(args, name) for name, _ in OVERRIDDEN})
    machine = machine_of(args.gpu, args.interconnect, intra=args.intra_link, overrides=overrides)
    request = Request(
        model_size=args.model_size,
        gpus=args.gpus,
        selection=args.selection,
        alpha=args.alpha,
        scope=args.eslm_scope,
        proxy_layers=args.eslm_proxy_layers,
        proxy_stride=args.eslm_proxy_stride,
        global_batch_size=args.global_batch_size,
    )
    if args.table is not None:
        return TABLES[args.table](request, machine)
    if args.top < 1:
        raise ConfigError(f"--top {args.top} must be 1 or more.")
    plans = search(request, machine, Pins(**{name: getattr(args, name) for name in PINNED}))
    if args.json:
        return json.dumps(_json(plans_values(plans[: args.top], request, machine), machine))
    return report(plans, request, machine, top=args.top)


def _json(plans: list[dict], machine: Machine) -> dict:
    return {"machine": machine.name, "plans": plans, "assumed": assumptions(machine)}


def _parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model-size", default="1.5B", metavar="|".join(SIZES))
    add("--gpus", type=int, default=8, help="how many (%(default)s)")
    add("--gpu", default="a100-80g", metavar="|".join(ACCELERATORS))
    add("--interconnect", default="infiniband-hdr", metavar="|".join(NETWORKS))
    add("--intra-link", default="nvlink", metavar="|".join(INTRA_LINKS))
    add("--selection", default="eslm", metavar="|".join(SELECTIONS))
    add("--alpha", type=float, default=0.1, help="share to drop (%(default)s)")
    add("--eslm-scope", choices=("step", "global", "local"), help="default: by the batch")
    add("--eslm-proxy-layers", type=int, default=1)
    add("--eslm-proxy-stride", type=int, default=1)
    add("--global-batch-size", type=int, help="sequences a step; default: the model's own")
    add("--top", type=int, default=5, help="layouts to print (%(default)s)")
    add("--json", action="store_true", help="print values instead of text")
    add("--table", choices=tuple(TABLES), help="print a table of docs/scaling.md instead")
    pinned = parser.add_argument_group("decided already (default: all that are allowed)")
    for name in PINNED:
        pinned.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    known = parser.add_argument_group("what you know better than the tables of hardware")
    for name, text in OVERRIDDEN:
        known.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
