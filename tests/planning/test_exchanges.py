"""What ranks send: against numbers worked by hand, and against what a real step sends."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plan_check import VOCAB_SIZE, engine_stepper
from megatron_eslm.config.run import parse_run
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.planning.exchanges import (
    Exchange,
    Exchanges,
    Group,
    Groups,
    link_bandwidth,
)
from megatron_eslm.planning.hardware import NCCL, machine_of
from megatron_eslm.planning.setting import Setting, rank_work
from tests.argv import later_wins
from tests.harness import run_ranks

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
BLOCKS, D, T, V = 3, 64, 32, 4096
"""V: 4,000 padded to a multiple of 128 x TP, the same for TP 1 and 2."""


def words(*flags: str) -> list[str]:
    base = (
        *("--data-path", "x", "--num-layers", str(BLOCKS), "--hidden-size", str(D)),
        *("--num-attention-heads", "2", "--seq-length", str(T), "--lr", "1e-4"),
        *("--train-iters", "10", "--eslm-alpha", "0.25", "--micro-batch-size", "8"),
    )
    return later_wins([*base, *flags])


def found(*flags: str, world: int, stage: int = 0) -> list[Exchange]:
    """Of one rank."""
    run = parse_run(words(*flags), world)
    setting = Setting.of(run, VOCAB_SIZE)
    exchanges = Exchanges(
        run=run,
        shape=setting.shape,
        plan=setting.plan,
        traits=setting.traits,
        groups=Groups.of(run, 8),
    )
    return exchanges.of_stage(stage, rank_work(setting).largest)


def sizes(exchanges: list[Exchange], kind: str) -> dict[tuple[str, str, str, int], float]:
    """count by (what, collective, phase, bytes)."""
    counts: Counter = Counter()
    for e in exchanges:
        if e.kind == kind:
            counts[e.what, e.collective, e.phase, round(e.num_bytes)] += e.count
    return dict(counts)


def test_tensor_parallel_by_hand() -> None:
    # 8 rows of 32 positions of 64 float32: 65,536 bytes; 6 of 8 rows are kept: 49,152; 144 of their
    # 192 tokens: 36,864. One block sees all rows, two the kept ones.
    assert sizes(found(TP, "2", world=2), "tensor") == {
        ("blocks", "all-reduce", "forward", 65_536): 2,
        ("blocks", "all-reduce", "backward", 65_536): 2,
        ("blocks", "all-reduce", "forward", 49_152): 4,
        ("blocks", "all-reduce", "backward", 49_152): 4,
        ("embedding", "all-reduce", "forward", 65_536): 1,
        ("early exit", "all-reduce", "forward", 256 * 4): 1,
        ("early exit", "all-reduce", "forward", 256 * 12): 1,
        ("head", "all-reduce", "forward", 192 * 4): 1,
        ("head", "all-reduce", "forward", 192 * 12): 1,
        ("head", "all-reduce", "backward", 36_864): 1,
    }


def test_sequence_parallel_by_hand() -> None:
    exchanges = sizes(found(TP, "2", "--sequence-parallel", world=2), "tensor")
    assert exchanges["blocks", "all-gather", "forward", 49_152] == 4
    assert exchanges["blocks", "reduce-scatter", "forward", 49_152] == 4
    assert exchanges["blocks", "all-gather", "backward", 49_152] == 8
    assert exchanges["blocks", "reduce-scatter", "backward", 49_152] == 4
    assert exchanges["norms", "all-reduce", "backward", 256] == 18
    assert exchanges["head", "all-gather", "forward", 49_152] == 1


def test_pipeline_by_hand() -> None:
    flags = (PP, "2", "--pipeline-split", "2,1")
    flags = (*flags, "--global-batch-size", "24")  # 3 micro-steps, 2 of them trained on
    first, last = found(*flags, world=2), found(*flags, world=2, stage=1)
    assert sizes(first, "pipeline") == {("hidden states", "send", "forward", 65_536): 1}
    assert sizes(last, "pipeline") == {("their gradients", "send", "backward", 65_536): 1}
    tied = {("tied embedding", "all-reduce", "step", V * D * 4): 1}
    assert sizes(first, "gradients") == sizes(last, "gradients") == tied


# Three blocks of 12 D^2 + 13 D, 4,096 + 32 embeddings, the final norm.
PARAMS = 3 * (12 * D * D + 13 * D) + (V + T) * D + 2 * D


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_data_parallel_by_hand(zero: int) -> None:
    exchanges = found("--zero-stage", str(zero), world=4)
    size, name = 4 * PARAMS, f"ZeRO {zero}"
    gradients, weights = {
        0: ({(name, "all-reduce", "step", size): 1}, {}),
        1: ({(name, "all-reduce", "step", size): 1}, {(name, "all-gather", "step", size): 1}),
        2: ({(name, "all-reduce", "backward", size): 1}, {(name, "all-gather", "step", size): 1}),
        3: (
            {(name, "reduce-scatter", "backward", size): 1},
            {
                (name, "all-gather", "forward", size): 1,
                (name, "all-gather", "backward", size): 1,
            },
        ),
    }[zero]
    assert sizes(exchanges, "gradients") == gradients
    assert sizes(exchanges, "weights") == weights


def test_selection_by_hand() -> None:
    def selection(*flags: str) -> dict:
        return sizes(found(*flags, world=4), "selection")

    rows = ("scores of rows", "all-gather", "forward", 4 * 4 * 8)
    tokens = ("scores of tokens", "all-gather", "forward", 4 * 4 * 8 * 32)
    count = ("number of kept tokens", "all-reduce", "forward", 8)
    assert selection() == selection("--selection", "random") == {rows: 1, tokens: 1}
    assert selection("--eslm-level", "token") == {tokens: 1}
    assert selection("--eslm-level", "instance") == {rows: 1, count: 1}
    assert selection("--selection", "clm") == selection("--eslm-scope", "local") == {count: 1}


def test_the_proxy_pass_by_hand() -> None:
    """Three chunks of 8 rows of 32 positions of 64 float32, of which every second is scored."""
    steps = ("--eslm-scope", "step", "--eslm-proxy-stride", "2")
    gather = {("scores of candidates", "all-gather", "step", 4 * 4 * 24): 1}
    exchanges = found(*steps, "--global-batch-size", "96", world=4)
    assert sizes(exchanges, "proxy") == gather
    assert sizes(exchanges, "selection") == {
        ("scores of tokens", "all-gather", "forward", 4 * 4 * 8 * 32): 1
    }
    tensor = found(*steps, "--global-batch-size", "24", TP, "2", world=2)
    assert sizes(tensor, "proxy") == {
        ("embedding", "all-reduce", "step", 65_536): 3,
        ("blocks", "all-reduce", "step", 65_536): 6,
        ("early exit", "all-reduce", "step", 128 * 4): 3,
        ("early exit", "all-reduce", "step", 128 * 12): 3,
    }
    # The micro-steps behind it are plain ones.
    blocks = [e for e in tensor if e.kind == "tensor" and e.what == "blocks"]
    assert {e.num_bytes for e in blocks} == {65_536}


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


class Sent(TorchDispatchMode):
    """Notes (collective, bytes of the whole tensor) of all that groups of several ranks send."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")
        if name[0] == "c10d":
            self._note(name[1].removesuffix("_"), args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        def total(x: Any) -> int:
            if isinstance(x, torch.Tensor):
                return x.numel() * x.element_size()
            return sum(map(total, x))

        groups = [ProcessGroup.unbox(a) for a in args if _is_group(a)]
        whole = {
            "allreduce": ("all-reduce", 0),
            "allgather": ("all-gather", 0),
            "_allgather_base": ("all-gather", 0),
            "_reduce_scatter_base": ("reduce-scatter", 1),
            "broadcast": ("broadcast", 0),
            "send": ("send", 0),
            "alltoall_base": ("all-to-all", 1),
        }
        if name in whole and groups[0].size() > 1:
            collective, argument = whole[name]
            self.seen[collective, total(args[argument])] += 1


AHEAD = ("--eslm-scope", "step", "--eslm-alpha", "0.3")
CASES = {
    "TP": (TP, "2"),
    "TP and sequence parallel": (TP, "2", "--sequence-parallel"),
    "TP with checkpoints": (TP, "2", "--activation-checkpoint-interval", "1"),
    "TP, sequence parallel, checkpoints": (
        *(TP, "2", "--sequence-parallel"),
        *("--activation-checkpoint-interval", "2"),
    ),
    "DP": (),
    "DP, ahead": AHEAD,
    "DP, drawn at random": ("--selection", "random", "--eslm-alpha", "0.5"),
    "DP, whole rows": ("--eslm-level", "instance"),
    "DP, local": ("--eslm-scope", "local", "--eslm-level", "instance"),
    "DP, ZeRO 1": ("--zero-stage", "1"),
    "DP, ZeRO 2": ("--zero-stage", "2"),
    # Large enough not to be kept whole (stage3_param_persistence_threshold).
    "DP, ZeRO 3": ("--zero-stage", "3", "--hidden-size", "512", "--num-layers", "2"),
    "DP, bf16": ("--bf16",),
    "DP, bf16, ZeRO 2": ("--bf16", "--zero-stage", "2"),
    "TP, ahead": (TP, "2", *AHEAD),
    "TP, sequence parallel, ahead": (TP, "2", "--sequence-parallel", *AHEAD),
    "PP": (PP, "2", "--pipeline-split", "2,1", *AHEAD),
    "PP, bf16": (PP, "2", "--pipeline-split", "2,1", "--bf16", *AHEAD),
}
LEAST = 2000
"""Bytes; below are norms of gradients, ZeRO 3's check of its trace and the like. DeepSpeed sends
gradients in one bucket."""


FOUR_RANKS = {
    "DP, PP": (PP, "2", "--pipeline-split", "2,1", "--seed", "1", *AHEAD),
    "DP, TP": (TP, "2", *AHEAD),
    "DP, TP, sequence parallel": (TP, "2", "--sequence-parallel", "--seed", "1", *AHEAD),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "broadcast", "send")


@pytest.mark.parametrize("world, cases", [(2, CASES), (4, FOUR_RANKS)], ids=["2", "4"])
def test_a_real_step_sends_this(world: int, cases: dict[str, tuple[str, ...]]) -> None:
    """Two micro-steps; with selection ahead of them one is left."""

    def batch(name: str) -> tuple[str, ...]:
        rows, dp = (4, 2) if world == 2 and "DP" in name else (8, world // 2 if "DP" in name else 1)
        return "--micro-batch-size", str(rows), "--global-batch-size", str(2 * rows * dp)

    def on_rank(rank: int) -> dict[str, tuple[int, Counter]]:
        init_distributed()
        seen = {}
        for name, flags in cases.items():
            argv = words(*flags, *batch(name))
            run = parse_run(argv, world)
            mesh = build_mesh(
                run.engine.tensor_model_parallel_size, run.engine.pipeline_model_parallel_size
            )
            step = engine_stepper(argv, mesh)
            if mesh.pp_size > 1:
                step()  # DeepSpeed says the shapes once
            with Sent() as sent:
                step()
            seen[name] = mesh.pp_rank, sent.seen
        return seen

    results = run_ranks(world, on_rank, timeout=300.0)
    for name, flags in cases.items():
        run = parse_run(words(*flags, *batch(name)), world)
        steps = 1 if run.selection.eslm_scope == "step" else 2
        for seen in results:
            stage, sent = seen[name]
            expected: Counter = Counter()
            for e in found(*flags, *batch(name), world=world, stage=stage):
                expected[e.collective, round(e.num_bytes)] += e.times(steps)
            bytes_of = {collective: _bytes(sent, collective) for collective in COLLECTIVES}
            hoped = {collective: _bytes(expected, collective) for collective in COLLECTIVES}
            assert bytes_of == pytest.approx(hoped, rel=0.01, abs=LEAST), (name, sent, expected)


def _bytes(counts: Counter, collective: str) -> float:
    return sum(n * size for (name, size), n in counts.items() if name == collective)


def group(size: int, per_node: int) -> Group:
    return Group(size=size, per_node=per_node)


def exchange(collective: Any, on: Group, num_bytes: float) -> Exchange:
    return Exchange(
        kind="gradients",
        what="",
        collective=collective,
        group=on,
        num_bytes=num_bytes,
        count=1,
        phase="step",
    )


def test_links_by_hand() -> None:
    a100 = machine_of("a100-80g", "infiniband-hdr")
    # One rank of the group in each machine of eight: an eighth of eight 25 GB/s cards.
    assert link_bandwidth(a100, group(16, 1)) == pytest.approx(0.8 * 25e9)
    assert link_bandwidth(a100, group(16, 8)) == pytest.approx(0.8 * 200e9)
    assert link_bandwidth(a100, group(8, 8)) == pytest.approx(0.8 * 300e9)
    ethernet = machine_of("a100-80g", "ethernet-100g", intra="pcie")
    assert link_bandwidth(ethernet, group(16, 8)) == pytest.approx(0.8 * 12.5e9)
    assert link_bandwidth(ethernet, group(2, 2)) == pytest.approx(0.8 * 32e9)


def test_time_of_collectives_by_hand() -> None:
    a100 = machine_of("a100-80g", "infiniband-hdr")
    simple = dataclasses.replace(a100, protocols=NCCL[1:])
    gather = exchange("all-gather", group(16, 8), 1.6e9)
    # 15 of 16 GB/10 at 160 GB/s; 14 hops inside machines and 1 between.
    expected = 1.5e9 / 160e9 + 8.4e-6 + 14 * 3.4e-6 + 14e-6
    assert gather.seconds(simple) == pytest.approx(expected)
    reduce = exchange("all-reduce", group(16, 8), 1.6e9)
    ring = 3e9 / 160e9 + 8.4e-6 + 28 * 3.4e-6 + 2 * 14e-6
    assert reduce.seconds(simple) == pytest.approx(ring)
    # A byte among many: the tree has 2 x (7 + log2(128)) levels, the ring 2 x 1023 hops.
    small = exchange("all-reduce", group(1024, 8), 8)
    assert small.seconds(a100) == pytest.approx(6.6e-6 + 2 * (7 * 0.6e-6 + 7 * 5e-6), rel=1e-3)
    assert exchange("all-reduce", group(1, 1), 1e9).seconds(a100) == 0
    assert exchange("send", group(2, 1), 20e6).seconds(simple) == pytest.approx(1e-3 + 22.4e-6)


def test_ranks_fill_machines_tensor_first() -> None:
    run = parse_run(words(TP, "2", PP, "2", "--zero-stage", "1", "--selection", "clm"), 32)
    groups = Groups.of(run, 8)
    assert (groups.tensor.size, groups.tensor.num_nodes) == (2, 1)
    assert (groups.data.size, groups.data.per_node, groups.data.num_nodes) == (8, 4, 2)
    assert groups.neighbours.num_nodes == 2
    assert (
        Groups.of(parse_run(words(PP, "2", "--selection", "clm"), 4), 8).neighbours.num_nodes == 1
    )
