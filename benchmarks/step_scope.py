"""What selection costs several ranks: once a step ahead of it, and within each micro-step.

torchrun --nproc-per-node 2 -m benchmarks.step_scope --rows 4 --seq-length 64
torchrun --nproc-per-node 2 -m benchmarks.step_scope --rows 4 --seq-length 64 --pipeline 2

A pipeline knows no selection within micro-steps.
"""

from __future__ import annotations

import torch.distributed as dist

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from megatron_eslm.launch.bootstrap import init_distributed, leave


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--alpha", default="0.1")
    made.add_argument("--proxy-stride", default="8", help="(%(default)s)")
    made.add_argument("--micro-steps", type=int, default=10, help="(%(default)s)")
    made.add_argument("--pipeline", type=int, default=1, help="stages (%(default)s)")
    args = made.parse_args()
    init_distributed()
    world = dist.get_world_size()
    common = (
        *training_flags(args, args.micro_steps * world // args.pipeline),
        *("--pipeline-model-parallel-size", str(args.pipeline)),
        *("--eslm-alpha", args.alpha, "--eslm-proxy-stride", args.proxy_stride),
    )
    scopes = ("step",) if args.pipeline > 1 else ("step", "global")
    runs = {"clm": BenchRun(*common, "--selection", "clm")}
    runs |= {scope: BenchRun(*common, "--eslm-scope", scope) for scope in scopes}
    timings = interleaved({name: run.stepper() for name, run in runs.items()}, args.repetitions)
    if dist.get_rank() == 0:
        layout = f"PP {args.pipeline}" if args.pipeline > 1 else f"DP {world}"
        for scope in scopes:
            report(
                f"ESLM / CLM, scope {scope}, {layout}, alpha {args.alpha}, {args.shape}",
                timings.ratio(scope, "clm"),
                "its count + 2 %" if scope == "step" else "",
                count=runs[scope].flops_of_step / runs["clm"].flops_of_step,
                spread=timings.ratios(scope, "clm"),
                clm_seconds=round(timings.median("clm"), 3),
                micro_steps=args.micro_steps,
                **settings(args),
            )
    leave()


if __name__ == "__main__":
    main()
