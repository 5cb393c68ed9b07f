"""What a step with selection costs against a plain one, and against the count of its products.

python -m benchmarks.selection_step                       # 124M, float32
python -m benchmarks.selection_step --dtype bf16
python -m benchmarks.selection_step --shape 1.5B-8        # 1.5B's blocks, 8 of them
"""

from __future__ import annotations

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, training_flags
from benchmarks.interleave import interleaved, report
from megatron_eslm.parallel.bootstrap import init_distributed

CASES = {
    "ESLM / CLM, alpha 0.1, proxy stride 8": ("0.1", "8", "<= 0.92"),
    "ESLM / CLM, alpha 0.2, proxy stride 8": ("0.2", "8", "<= 0.81"),
    "ESLM / CLM, alpha 0.1, exact proxy": ("0.1", "1", "<= 1.00"),
}
DEEP = {"ESLM / CLM, alpha 0.1, exact proxy": ("0.1", "1", "within 3% of its count")}


def main() -> None:
    args = parser(__doc__).parse_args()
    common = training_flags(args)
    cases = DEEP if args.shape.startswith("1.5B") else CASES
    init_distributed()
    runs = {"clm": BenchRun(*common, "--selection", "clm")}
    for name, (alpha, stride, _) in cases.items():
        runs[name] = BenchRun(*common, "--eslm-alpha", alpha, "--eslm-proxy-stride", stride)
    timings = interleaved({name: run.stepper() for name, run in runs.items()}, args.repetitions)
    for name, (_, _, target) in cases.items():
        report(
            f"{name}, {args.shape}, {args.dtype}",
            timings.ratio(name, "clm"),
            target,
            count=runs[name].flops_of_step / runs["clm"].flops_of_step,
            spread=timings.ratios(name, "clm"),
            clm_seconds=round(timings.median("clm"), 3),
            clm_tflops=round(runs["clm"].flops_of_step / timings.median("clm") / 1e12, 4),
            rows=args.rows,
            seq_length=args.seq_length,
            repetitions=args.repetitions,
        )


if __name__ == "__main__":
    main()
