"""What a step with selection costs against a plain one, and against the count of its products.

python -m benchmarks.selection_step                       # 124M, float32
python -m benchmarks.selection_step --dtype bf16
python -m benchmarks.selection_step --shape 1.5B-8        # 1.5B's blocks, 8 of them
"""

from __future__ import annotations

from benchmarks.engines import BenchRun
from benchmarks.flags import GPT2_VOCAB, parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from megatron_eslm.launch.bootstrap import init_distributed

ESLM, RANDOM = ("--selection", "eslm"), ("--selection", "random")
CASES = {
    "ESLM / CLM, alpha 0.1, proxy stride 8": (
        (*ESLM, "--eslm-alpha", "0.1", "--eslm-proxy-stride", "8"),
        "<= 0.92",
    ),
    "ESLM / CLM, alpha 0.2, proxy stride 8": (
        (*ESLM, "--eslm-alpha", "0.2", "--eslm-proxy-stride", "8"),
        "<= 0.81",
    ),
    "ESLM / CLM, alpha 0.1, exact proxy": ((*ESLM, "--eslm-alpha", "0.1"), "<= 1.00"),
    "random / CLM, alpha 0.1": ((*RANDOM, "--eslm-alpha", "0.1"), "the control"),
    "random / CLM, alpha 0.2": ((*RANDOM, "--eslm-alpha", "0.2"), "the control"),
}
DEEP = {
    "ESLM / CLM, alpha 0.1, exact proxy": (
        (*ESLM, "--eslm-alpha", "0.1"),
        "within 3% of its count",
    ),
    "random / CLM, alpha 0.1": ((*RANDOM, "--eslm-alpha", "0.1"), "the control"),
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--vocab-size", type=int, default=GPT2_VOCAB, help="(%(default)s)")
    made.add_argument("--only", default="", help="no cases but those whose name contains this")
    args = made.parse_args()
    common = training_flags(args)
    cases = DEEP if args.shape.startswith(("1.5B", "llama-1B")) else CASES
    cases = {name: case for name, case in cases.items() if args.only in name}
    init_distributed()
    runs = {"clm": BenchRun(*common, "--selection", "clm", vocab_size=args.vocab_size)}
    for name, (flags, _) in cases.items():
        runs[name] = BenchRun(*common, *flags, vocab_size=args.vocab_size)
    timings = interleaved({name: run.stepper() for name, run in runs.items()}, args.repetitions)
    for name, (_, target) in cases.items():
        report(
            f"{name}, {args.shape}, {args.dtype}",
            timings.ratio(name, "clm"),
            target,
            count=runs[name].flops_of_step / runs["clm"].flops_of_step,
            spread=timings.ratios(name, "clm"),
            clm_seconds=round(timings.median("clm"), 3),
            clm_tflops=round(runs["clm"].flops_of_step / timings.median("clm") / 1e12, 4),
            **settings(args),
        )


if __name__ == "__main__":
    main()
