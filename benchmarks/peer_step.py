"""Our plain step against transformers' GPT-2 in a plain loop.

python -m benchmarks.peer_step
python -m benchmarks.peer_step --dtype bf16
"""

from __future__ import annotations

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from benchmarks.peer import peer_stepper
from megatron_eslm.launch.bootstrap import init_distributed


def main() -> None:
    args = parser(__doc__).parse_args()
    init_distributed()
    run = BenchRun(*training_flags(args), "--selection", "clm")
    timings = interleaved({"ours": run.stepper(), "peer": peer_stepper(run)}, args.repetitions)
    report(
        f"CLM step / transformers' GPT-2, {args.shape}, {args.dtype}",
        timings.ratio("ours", "peer"),
        "<= 0.95",
        spread=timings.ratios("ours", "peer"),
        our_seconds=round(timings.median("ours"), 3),
        peer_seconds=round(timings.median("peer"), 3),
        our_tflops=round(run.flops_of_step / timings.median("ours") / 1e12, 4),
        **settings(args),
    )


if __name__ == "__main__":
    main()
