"""What --compile does for a plain step.

python -m benchmarks.compile_step
"""

from __future__ import annotations

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from megatron_eslm.launch.bootstrap import init_distributed


def main() -> None:
    args = parser(__doc__).parse_args()
    common = (*training_flags(args), "--selection", "clm")
    init_distributed()
    cases = {"plain": BenchRun(*common, "--no-compile").stepper()}
    cases["compiled"] = BenchRun(*common, "--compile").stepper()
    timings = interleaved(cases, args.repetitions)
    report(
        f"CLM step, --compile / plain, {args.shape}, {args.dtype}",
        timings.ratio("compiled", "plain"),
        "< 1",
        spread=timings.ratios("compiled", "plain"),
        plain_seconds=round(timings.median("plain"), 3),
        **settings(args),
    )


if __name__ == "__main__":
    main()
