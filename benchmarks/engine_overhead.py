"""What DeepSpeed's engine costs on one rank: our step against the same model in a bare loop.

python -m benchmarks.engine_overhead
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from megatron_eslm.engine.engine import build_optimizer
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.training.build import build_model


def bare_stepper(run: BenchRun) -> Callable[[], Any]:
    """Forward, backward, clipping, AdamW and nothing else, on the same batches."""
    everything = range(run.shape.num_layers)
    model = build_model(run.run, run.shape, run.mesh, run.policy, run.recorder, everything)
    model.train().to(run.device, run.run.dtype)
    optimizer = build_optimizer(model, run.run.optimizer, cpu_offload=False)
    batches = run.batches()

    def step() -> None:
        for batch in batches:
            (model(*batch) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.recorder.take()

    return step


def main() -> None:
    args = parser(__doc__).parse_args()
    init_distributed()
    ours, bare = (BenchRun(*training_flags(args), "--selection", "clm") for _ in range(2))
    cases = {"ours": ours.stepper(), "bare": bare_stepper(bare)}
    timings = interleaved(cases, args.repetitions)
    report(
        f"our step / the same model in a bare loop, {args.shape}, {args.dtype}",
        timings.ratio("ours", "bare"),
        "<= 1.05",
        spread=timings.ratios("ours", "bare"),
        our_seconds=round(timings.median("ours"), 3),
        bare_seconds=round(timings.median("bare"), 3),
        **settings(args),
    )


if __name__ == "__main__":
    main()
