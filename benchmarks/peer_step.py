"""Our plain step against a plain loop around transformers' GPT-2 or around a plain one.

python -m benchmarks.peer_step
python -m benchmarks.peer_step --dtype bf16
python -m benchmarks.peer_step --peer plain --rows 4
python -m benchmarks.peer_step --peer plain --rows 4 --compile
python -m benchmarks.peer_step --peer plain --rows 4 --dtype bf16 --masters none
"""

from __future__ import annotations

import time
from typing import get_args

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from benchmarks.peer import Masters, peer_stepper, plain_stepper
from megatron_eslm.launch.bootstrap import init_distributed

_BF16 = {
    "copies": "bf16 with float32 copies of the weights",
    "autocast": "bf16 by autocast over float32 weights",
    "none": "bf16 without float32 weights",
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--peer", choices=("transformers", "plain"), default="transformers")
    made.add_argument(
        "--masters",
        choices=get_args(Masters),
        default="copies",
        help="where the plain peer keeps float32 weights in bf16 (%(default)s)",
    )
    made.add_argument("--compile", action="store_true", help="both; with the plain peer only")
    made.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="compare CPU seconds, on a machine whose cores others use, too",
    )
    args = made.parse_args()
    if args.compile and args.peer != "plain":
        made.error("--compile needs --peer plain")
    init_distributed()
    compiling = "--compile" if args.compile else "--no-compile"
    run = BenchRun(*training_flags(args), "--selection", "clm", compiling)
    if args.peer == "plain":
        name, peer = "plain GPT-2", plain_stepper(run, masters=args.masters, compiled=args.compile)
    else:
        name, peer = "transformers' GPT-2", peer_stepper(run)
    kind = args.dtype
    if args.peer == "plain" and args.dtype == "bf16":
        kind = f"the peer {_BF16[args.masters]}"
    timings = interleaved(
        {"ours": run.stepper(), "peer": peer},
        args.repetitions,
        clock=time.process_time if args.cpu_seconds else time.perf_counter,
    )
    report(
        f"CLM step / {name}, {args.shape}, {args.rows} x {args.seq_length}, {kind}"
        f"{', both compiled' if args.compile else ''}",
        timings.ratio("ours", "peer"),
        "<= 0.95",
        spread=timings.ratios("ours", "peer"),
        our_seconds=round(timings.median("ours"), 3),
        peer_seconds=round(timings.median("peer"), 3),
        our_tflops=round(run.flops_of_step / timings.median("ours") / 1e12, 4),
        cpu_seconds=args.cpu_seconds,
        **settings(args),
    )


if __name__ == "__main__":
    main()
