"""Where the time of a training step goes, by operation and size of its operands.

python -m benchmarks.profile_step                     # eslm, alpha 0.1
python -m benchmarks.profile_step --flags --selection clm
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, training_flags
from benchmarks.interleave import machine
from megatron_eslm.launch.bootstrap import init_distributed


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--top", type=int, default=14, help="lines (%(default)s)")
    made.add_argument(
        "--flags",
        nargs=argparse.REMAINDER,
        default=["--eslm-alpha", "0.1"],
        help="what pretrain_gpt.py is to be told besides; the last of the flags (%(default)s)",
    )
    args = made.parse_args()
    init_distributed()
    run = BenchRun(*training_flags(args), *args.flags)
    step = run.stepper()
    step()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(args.repetitions):
            step()
    kinds = profiled.key_averages(group_by_input_shape=True)
    spent = sorted(((_own_seconds(kind), kind) for kind in kinds), key=lambda pair: -pair[0])
    total = sum(seconds for seconds, _ in spent)
    print(
        f"{' '.join(args.flags)}, {args.shape}, {args.dtype}, {args.rows} x {args.seq_length}: "
        f"{total / args.repetitions:.3f} s a step in operations, {machine()}\n"
    )
    print("| operation | operands | calls a step | ms a step | share |\n|---|---|---:|---:|---:|")
    for seconds, kind in spent[: args.top]:
        sizes = ", ".join("x".join(map(str, s)) for s in kind.input_shapes if s)
        print(
            f"| {kind.key} | {sizes} | {kind.count / args.repetitions:g} | "
            f"{1e3 * seconds / args.repetitions:.1f} | {seconds / total:.1%} |"
        )
    rest = sum(seconds for seconds, _ in spent[args.top :])
    print(f"| all others | | | {1e3 * rest / args.repetitions:.1f} | {rest / total:.1%} |")


def _own_seconds(kind: Any) -> float:
    """Without what it calls; on the accelerator where there is one."""
    on_device = torch.cuda.is_available()
    return (kind.self_device_time_total if on_device else kind.self_cpu_time_total) / 1e6


if __name__ == "__main__":
    main()
