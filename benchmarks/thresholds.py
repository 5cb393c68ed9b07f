"""The share of a step that global thresholds take: gathering scores, and the keep rule.

    torchrun --nproc-per-node 4 -m benchmarks.thresholds --rows 2

Ranks meet before each choice, so that waiting for the slowest of them, which the step would do a
little later anyway, is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from megatron_eslm.launch.bootstrap import init_distributed, leave


def main() -> None:
    args = parser(__doc__).parse_args()
    init_distributed()
    ranks = dist.get_world_size()
    run = BenchRun(*training_flags(args, ranks), "--eslm-alpha", "0.1")
    spent = [0.0]

    def timed_choice(choose: Callable[..., Any]) -> Callable[..., Any]:
        def choice(*words: Any, **named: Any) -> Any:
            dist.barrier()
            begin = time.perf_counter()
            decision = choose(*words, **named)
            spent[0] += time.perf_counter() - begin
            return decision

        return choice

    policy = run.policy
    policy.keep = timed_choice(policy.keep)  # type: ignore[method-assign]
    step, shares = run.stepper(), []

    def timed() -> None:
        spent[0] = 0.0
        begin = time.perf_counter()
        step()
        shares.append(spent[0] / (time.perf_counter() - begin))

    timings = interleaved({"eslm": timed}, args.repetitions)
    if dist.get_rank() == 0:
        del shares[0]  # the warm-up
        report(
            f"share of a step for global thresholds, {ranks} ranks, {args.shape}, {args.dtype}",
            sorted(shares)[len(shares) // 2],
            "<= 0.01",
            spread=shares,
            step_seconds=round(timings.median("eslm"), 3),
            **settings(args),
        )
    leave()


if __name__ == "__main__":
    main()
