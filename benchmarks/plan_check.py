"""Predicted against measured step time of six layouts on this machine's processor, over gloo.

python -m benchmarks.plan_check                       # eslm, 5 repetitions
python -m benchmarks.plan_check --selection clm

The cost model of megatron_eslm/planning gets a machine whose numbers are measured in the same
launch, before and after each step, on all ranks at once: the rates of matrix products, elementwise
kernels and the head's statistics and the time of a small kernel (all in processor time), and gloo's
latency and bandwidth between two ranks. Ranks that are more than cores share them: there are as
many cores as all ranks together get seconds of processor time in a second while they measure, so
that other work on the machine counts too. Each step is compared with the mean of the predictions
before and after it; the error is the median over steps. Processor time, which other work hardly
touches, is compared besides: that of all ranks in a step, with what the model says they compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.engines import stepper
from benchmarks.interleave import machine as processor
from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import plan_stages
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics
from megatron_eslm.parallel.mesh import Mesh, build_mesh
from megatron_eslm.planning.cost import step_cost
from megatron_eslm.planning.hardware import Machine, Protocol
from megatron_eslm.planning.setting import Setting
from megatron_eslm.planning.stage_clock import COLUMN_TRAFFIC, RESIDUAL_TRAFFIC
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from megatron_eslm.training.build import build_engine, build_model
from megatron_eslm.watchdog.phases import Phases
from tests.harness import run_ranks

VOCAB_SIZE, HIDDEN, LAYERS, HEADS, LENGTH = 4000, 256, 4, 4, 128
ROWS, MICRO_STEPS = 8, 4
"""Of a global micro-step, however many ranks share it, and of a step."""

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    "DP 2": (2, ()),
    "TP 2": (2, (TP, "2")),
    "PP 2": (2, (PP, "2")),
    "TP 2 x PP 2": (4, (TP, "2", PP, "2")),
    "DP 2 x PP 2": (4, (PP, "2")),
}


def flags(layout: str, selection: str, alpha: float) -> list[str]:
    """Of pretrain_gpt.py for one of the layouts."""
    dp = 2 if layout.startswith("DP") else 1
    words = {
        "--num-layers": LAYERS,
        "--hidden-size": HIDDEN,
        "--num-attention-heads": HEADS,
        "--seq-length": LENGTH,
        "--micro-batch-size": ROWS // dp,
        "--global-batch-size": ROWS * MICRO_STEPS,
        "--selection": selection,
        "--eslm-alpha": alpha,
        "--lr": 1e-4,
        "--train-iters": 1000,
    }
    given = [word for name, value in words.items() for word in (name, str(value))]
    return ["--data-path", "none", *given, *LAYOUTS[layout][1]]


def seconds_of(call: Callable[[], object], at_least: float = 0.04) -> float:
    """Processor time of one call, from as many as take `at_least` seconds."""
    call()
    count, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < at_least:
        call()
        count += 1
    return spent / count


@dataclass(frozen=True)
class Rates:
    """What one rank measured; compute for a second of processor time."""

    share: float
    """Of a core that the rank got meanwhile."""

    product_flops: float
    bytes_per_second: float
    kernel_seconds: float
    logit_bytes: float
    latency: float
    bandwidth: float


def measure_rates(pair: dist.ProcessGroup | None) -> Rates:
    """Of this rank, while all others do the same. Collective over the pair."""
    dist.barrier()
    wall, processor_time = time.perf_counter(), time.process_time()
    tokens = ROWS * LENGTH // 2
    x, w = torch.randn(tokens, HIDDEN), torch.randn(HIDDEN, 4 * HIDDEN)
    product = 2 * tokens * HIDDEN * 4 * HIDDEN / seconds_of(lambda: x @ w)
    # The elementwise kernels of a block, forward and backward, as the model counts them.
    weight, bias = torch.ones(HIDDEN), torch.zeros(HIDDEN)
    wide = torch.randn(tokens, 4 * HIDDEN, requires_grad=True)
    narrow = torch.randn(tokens, HIDDEN, requires_grad=True)

    def elementwise() -> None:
        out = narrow + (F.layer_norm(narrow, weight.shape, weight, bias) + bias)
        out = out + (F.layer_norm(out, weight.shape, weight, bias) + bias)
        (out.sum() + F.gelu(wide, approximate="tanh").sum()).backward()

    moved = 3 * tokens * HIDDEN * 4 * (RESIDUAL_TRAFFIC + COLUMN_TRAFFIC)
    speed = moved / seconds_of(elementwise)
    small = torch.ones(1)
    kernel = seconds_of(lambda: small + small, 0.01)
    head, labels = torch.randn(VOCAB_SIZE, HIDDEN), torch.zeros(tokens, dtype=torch.int64)
    shard = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)
    whole = seconds_of(lambda: head_statistics(x, head, labels, shard, entropy=False))
    products = 2 * tokens * HIDDEN * VOCAB_SIZE / product
    logit = max(0.0, whole - products) * speed / (tokens * VOCAB_SIZE)
    share = (time.process_time() - processor_time) / (time.perf_counter() - wall)
    latency, bandwidth = 0.0, 1.0
    if pair is not None:
        one, many = torch.ones(1), torch.ones(tokens * HIDDEN)
        latency, whole = _together(pair, one, 20), _together(pair, many, 10)
        bandwidth = 4 * many.numel() / max(whole - latency, whole / 2)
    return Rates(share, product, speed, kernel, logit, latency, bandwidth)


def _together(group: dist.ProcessGroup, x: torch.Tensor, times: int) -> float:
    dist.barrier(group=group)
    begin = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(x, group=group)
    return (time.perf_counter() - begin) / times


def machine_from(ranks: list[Rates]) -> Machine:
    """A processor whose cores run one process each at the speed that was measured."""

    def mean(of: Callable[[Rates], float]) -> float:
        return statistics.mean(map(of, ranks))

    world, bandwidth = len(ranks), mean(lambda rank: rank.bandwidth)
    logit = mean(lambda rank: rank.logit_bytes)
    protocol = Protocol(
        base=mean(lambda rank: rank.latency),
        hop_intra=0.0,
        hop_inter=0.0,
        tree_hop_intra=0.0,
        tree_hop_inter=0.0,
        bandwidth_share=1.0,
    )
    return Machine(
        name=processor(),
        peak_flops=mean(lambda rank: rank.product_flops),
        efficiency=1.0,
        memory_bytes=float("inf"),
        memory_bandwidth=mean(lambda rank: rank.bytes_per_second),
        intra_bandwidth=bandwidth,
        node_bandwidth=bandwidth,
        gpus_per_node=world,
        protocols=(protocol,),
        link_efficiency=1.0,
        usable_memory=1.0,
        launch_seconds=mean(lambda rank: rank.kernel_seconds),
        host_overlaps=False,
        wait_seconds=0.0,
        logit_bytes=(logit, logit),
        hidden_share=0.0,
        cores=sum(rank.share for rank in ranks),
    )


def _pairs(world: int) -> dist.ProcessGroup | None:
    """This rank's neighbour and it; None alone."""
    if world == 1:
        return None
    groups = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    return groups[dist.get_rank() // 2]


def calibrate(pair: dist.ProcessGroup | None) -> Machine:
    """The machine as it is now. Collective."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, measure_rates(pair))
    return machine_from(everyone)


def engine_stepper(words: list[str], mesh: Mesh) -> Callable[[], None]:
    """An engine as training builds it, and a step of it on random ids."""
    run = parse_run(words, mesh.world_size)
    shape = run.shape(VOCAB_SIZE)
    state = SelectionState(alpha=run.selection.initial_alpha)
    peers = Peers(mesh.dp_rank, mesh.dp_size, mesh.dp_group, Phases())
    policy = build_policy(run.selection, state, peers, run.training.seed)
    plan = plan_stages(run, shape, build_flops(run, shape, state), step_work(run))
    model = build_model(run, shape, mesh, policy, Recorder(), plan.blocks(mesh.pp_rank))
    return stepper(build_engine(run, model, mesh, peers.phases), run, VOCAB_SIZE)


def measure(layout: str, selection: str, alpha: float, repetitions: int) -> dict[str, float]:
    """One launch: calibration, steps, calibration; predicted and measured seconds."""
    world = LAYOUTS[layout][0]
    words = flags(layout, selection, alpha)

    def on_rank(rank: int) -> tuple[list[Machine], list[float], list[float]]:
        init_distributed()
        run = parse_run(words, world)
        mesh = build_mesh(
            run.engine.tensor_model_parallel_size, run.engine.pipeline_model_parallel_size
        )
        pair = _pairs(world)
        step = engine_stepper(words, mesh)
        step()
        calibrate(pair)
        machines, seconds, processor_seconds = [calibrate(pair)], [], []
        for _ in range(repetitions):
            dist.barrier()
            begin, busy = time.perf_counter(), time.process_time()
            step()
            processor_seconds.append(time.process_time() - busy)
            dist.barrier()
            seconds.append(time.perf_counter() - begin)
            machines.append(calibrate(pair))
        return machines, seconds, processor_seconds

    results = run_ranks(world, on_rank, timeout=600.0)
    machines, seconds, _ = results[0]
    busy = [sum(of_ranks) for of_ranks in zip(*(r[2] for r in results), strict=True)]
    setting = Setting.of(parse_run(words, world), VOCAB_SIZE, device_type="cpu")
    costs = [step_cost(setting, machine) for machine in machines]
    predicted = [(a.seconds + b.seconds) / 2 for a, b in pairwise(costs)]
    errors = [p / m - 1 for p, m in zip(predicted, seconds, strict=True)]

    def middle(of: Callable[[Machine], float]) -> float:
        return statistics.median(map(of, machines))

    return {
        "measured_seconds": statistics.median(seconds),
        "predicted_seconds": statistics.median(predicted),
        "error": statistics.median(errors),
        "smallest_error": min(errors),
        "largest_error": max(errors),
        "measured_processor_seconds": statistics.median(busy),
        "predicted_processor_seconds": statistics.median(c.computing_seconds for c in costs),
        "cores": middle(lambda machine: machine.cores or 0.0),
        "gflops": middle(lambda machine: machine.peak_flops / 1e9),
        "gbytes_per_s": middle(lambda machine: machine.memory_bandwidth / 1e9),
        "gloo_us": middle(lambda machine: 1e6 * machine.protocols[0].base),
        "gloo_gb_per_s": middle(lambda machine: machine.intra_bandwidth / 1e9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--selection", default="eslm", choices=("clm", "eslm", "random"))
    parser.add_argument("--eslm-alpha", type=float, default=0.1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    args = parser.parse_args()
    rows = []
    for layout in args.layouts:
        values = measure(layout, args.selection, args.eslm_alpha, args.repetitions)
        about = {"row": f"plan, {layout}", "selection": args.selection, "on": processor()}
        print(json.dumps({**about, **values, "repetitions": args.repetitions}), flush=True)
        rows.append((layout, values))
    print(
        "\n| layout | measured s | predicted s | error | single steps | processor s | predicted |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for layout, v in rows:
        print(
            f"| {layout} | {v['measured_seconds']:.3f} | {v['predicted_seconds']:.3f} | "
            f"{v['error']:+.0%} | {v['smallest_error']:+.0%} to {v['largest_error']:+.0%} | "
            f"{v['measured_processor_seconds']:.3f} | {v['predicted_processor_seconds']:.3f} |"
        )


if __name__ == "__main__":
    main()
