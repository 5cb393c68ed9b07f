"""What dealing kept rows evenly to data-parallel ranks buys.

    torchrun --nproc-per-node 2 -m benchmarks.balance --seq-length 128

Steps of eslm with --eslm-balance over those with --no-eslm-balance, on the same batches, which are
others in each repetition: how unequal the ranks are is a matter of luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from megatron_eslm.parallel.bootstrap import init_distributed, leave


def changing_stepper(run: BenchRun, largest: list[int]) -> Callable[[], Any]:
    """A step on other batches each time; notes how many rows the rank with most works on."""
    engine, seed = run.engine, 0

    def step() -> None:
        nonlocal seed
        seed += 1
        engine.step(iter(run.batches(seed)), 1e-5)
        for record in run.recorder.take():
            kept: list[int] = [0] * run.mesh.dp_size
            dist.all_gather_object(kept, record.num_rows_kept)
            # Dealt, no rank has more than the share rounded up.
            share = math.ceil(sum(kept) / len(kept))
            largest.append(share if run.policy.deals_rows else max(kept))
        run.state.iteration += 1

    return step


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--alpha", default="0.2")
    args = made.parse_args()
    init_distributed()
    ranks = dist.get_world_size()
    flags = (*training_flags(args, ranks), "--eslm-alpha", args.alpha)
    dealt, stay = BenchRun(*flags), BenchRun(*flags, "--no-eslm-balance")
    rows: dict[str, list[int]] = {"dealt": [], "stay": []}
    cases = {
        "dealt": changing_stepper(dealt, rows["dealt"]),
        "stay": changing_stepper(stay, rows["stay"]),
    }
    timings = interleaved(cases, args.repetitions)
    if dist.get_rank() == 0:
        most = {name: sum(numbers[1:]) / (len(numbers) - 1) for name, numbers in rows.items()}
        report(
            f"ESLM step, rows dealt / left, {ranks} ranks, alpha {args.alpha}, {args.shape}",
            timings.ratio("dealt", "stay"),
            "the ratio of the largest ranks' rows",
            count=most["dealt"] / most["stay"],
            spread=timings.ratios("dealt", "stay"),
            largest_rows=most,
            **settings(args),
        )
    leave()


if __name__ == "__main__":
    main()
