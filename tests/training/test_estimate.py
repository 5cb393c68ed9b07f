"""`--dry-run`: the numbers that it promises are those that a real run then reports."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.flops import Work
from megatron_eslm.cost.memory import (
    MemoryEstimate,
    alignment_bytes,
    block_activations,
    estimate_memory,
)
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import plan_stages
from megatron_eslm.data.batch import Batch
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from megatron_eslm.training.build import build_model
from megatron_eslm.training.dry_run import dry_run
from megatron_eslm.training.gradient_alignment import gradient_products
from megatron_eslm.training.loop import Trainer
from tests.argv import later_wins
from tests.harness import run_ranks

from .runs import Outcome, train, words


def number(text: str, label: str) -> float:
    found = re.search(rf"^{label}\s+([\d,.e+]+)", text, re.MULTILINE)
    assert found, (label, text)
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "flags",
    [
        ("--eslm-alpha", "0.3"),
        ("--eslm-alpha", "0.3", "--eslm-level", "instance"),
        ("--eslm-alpha", "0.3", "--eslm-level", "token"),
        ("--eslm-alpha", "0.3", "--eslm-scope", "local"),
        ("--eslm-alpha", "0.3", "--eslm-proxy-stride", "4"),
        ("--selection", "clm"),
        ("--selection", "random", "--eslm-alpha", "0.2"),
        ("--selection", "random", "--eslm-alpha", "0.3", "--eslm-level", "instance"),
        ("--selection", "random", "--eslm-alpha", "0.3", "--eslm-level", "token"),
        ("--selection", "greats", "--eslm-alpha", "0.3", "--split", "90,10"),
        ("--selection", "greats", "--eslm-alpha", "0", "--split", "90,10"),
        ("--eslm-alpha", "0.5", "--eslm-start-iter", "1", "--eslm-alpha-warmup-iters", "1"),
        ("--head-logits", "recompute"),
    ],
    ids=" ".join,
)
def test_promised_and_done(
    data: list[str], tmp_path: Path, flags: tuple[str, ...], world: int
) -> None:
    def fn(rank: int) -> tuple[str, Outcome]:
        argv = words(
            data, *flags, "--global-batch-size", "16", iters=3, micro_batch_size=8 // world
        )
        init_distributed()
        text, refusal = dry_run(parse_run([*argv, "--dry-run"], world))
        assert refusal is None
        return text, train(argv, tmp_path / "m.jsonl")

    text, outcome = run_ranks(world, fn)[0]
    last = outcome.steps[-1]
    assert number(text, "steps") == 3
    assert number(text, "tokens read") == last["tokens"] == 3 * 16 * 32
    assert number(text, "tokens trained on") == last["tokens_trained"]
    assert number(text, "FLOPs executed") == pytest.approx(last["flops"], rel=1e-3)
    assert number(text, "FLOPs by the paper") == pytest.approx(last["flops_paper"], rel=1e-3)
    assert f"2 micro-steps x {world} ranks x {8 // world}" in text


WORK = {
    "clm": ("--selection", "clm"),
    "eslm": ("--eslm-alpha", "0.3"),
    "eslm instances": ("--eslm-alpha", "0.3", "--eslm-level", "instance"),
    "eslm tokens": ("--eslm-alpha", "0.3", "--eslm-level", "token"),
    "eslm local": ("--eslm-alpha", "0.3", "--eslm-scope", "local"),
    "random": ("--selection", "random", "--eslm-alpha", "0.3"),
    "random instances": (
        "--selection",
        "random",
        "--eslm-alpha",
        "0.3",
        "--eslm-level",
        "instance",
    ),
    "random tokens": ("--selection", "random", "--eslm-alpha", "0.3", "--eslm-level", "token"),
    "rho1": ("--selection", "rho1", "--eslm-alpha", "0.3", "--reference", "trained"),
    "rho1 local": (
        *("--selection", "rho1", "--eslm-alpha", "0.3", "--reference", "trained"),
        *("--eslm-scope", "local"),
    ),
    "greats": ("--selection", "greats", "--eslm-alpha", "0.3", "--split", "90,10"),
    "uncertainty": ("--selection", "uncertainty", "--load", "weights"),
}


@pytest.mark.parametrize("world", [1, 2])
def test_the_work_of_a_step_is_what_a_step_does(data: list[str], start: Path, world: int) -> None:
    def fn(rank: int) -> dict[str, tuple[Work, list[Work]]]:
        found = {}
        for name, flags in WORK.items():
            given = [start / word if word in ("trained", "weights") else word for word in flags]
            argv = words(data, *given, "--global-batch-size", 16, micro_batch_size=8 // world)
            done: list[Work] = []

            def prepare(trainer: Trainer, done: list[Work] = done) -> None:
                ordinary = trainer.flops

                class Seen:
                    def executed(self, work: Work) -> float:
                        done.append(work)
                        return ordinary.executed(work)

                    model_flops = staticmethod(ordinary.model_flops)
                    paper_flops = staticmethod(ordinary.paper_flops)

                trainer.flops = Seen()

            train([*argv, "--train-iters", "2"], prepare=prepare)
            found[name] = step_work(parse_run(argv, world)), done
        return found

    for name, (told, done) in run_ranks(world, fn, timeout=240)[0].items():
        assert done == [told] * 2, name


def test_what_it_says_of_model_and_data(data: list[str]) -> None:
    def fn(rank: int) -> str:
        init_distributed()
        return dry_run(parse_run(words(data), 1))[0]

    text = run_ranks(1, fn)[0]
    # 384 x 32 + 32 x 32 + 3 x (12 x 32^2 + 13 x 32) + 64
    assert number(text, "parameters") == 51_488
    assert "vocabulary 257 padded to 384" in text
    assert re.search(
        r"domain prose +weight 0\.6000, 392 documents, [\d,]+ tokens, 0\.\d+ epochs", text
    )
    assert re.search(r"domain code +weight 0\.4000", text)
    assert "validation           16 sequences per evaluation" in text
    assert "GiB = weights" in text


def test_a_run_that_reads_too_much_is_described_and_refused(data: list[str]) -> None:
    def fn(rank: int) -> tuple[str, str]:
        init_distributed()
        text, refusal = dry_run(parse_run(words(data, iters=100_000), 1))
        return text, str(refusal)

    text, refusal = run_ranks(1, fn)[0]
    assert number(text, "steps") == 100_000 and re.search(r"domain prose .* [\d,.]+ epochs", text)
    assert "--max-epochs 1 allows" in refusal


TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"


def test_layout_and_plan_of_many_processes(data: list[str]) -> None:
    """Described by one process; a pipeline of three stages with their blocks."""

    def fn(rank: int) -> list[str]:
        init_distributed()
        flags = (PP, 3, TP, 2, "--sequence-parallel", "--activation-checkpoint-interval", 2)
        argv = words(data, *flags, "--global-batch-size", 64, "--eslm-alpha", 0.3, "--dry-run")
        return [
            dry_run(parse_run([*argv, "--dry-run-world-size", "24"], 1))[0],
            dry_run(parse_run(words(data, "--dry-run"), 1))[0],
        ]

    many, one = run_ranks(1, fn)[0]
    assert "2 micro-steps x 4 ranks x 8; trained on 32 = 1 x 4 x 8 (50.0% dropped)" in many
    assert (
        "layout               2 tensor x 3 pipeline x 4 data-parallel ranks, ZeRO 0, sequence "
        "parallel, activation checkpoints every 2 blocks" in many
    )
    assert "pipeline             each stage idle for 66.7% of a step at best" in many
    assert "which needs most)" in many
    stages = re.findall(r"^(\d) +(\d) \(1\) .*\d  ?(.*)$", many, re.MULTILINE)
    assert [stage[:2] for stage in stages] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert "the most expensive stage costs" in many
    assert "1 tensor x 1 pipeline x 1 data-parallel ranks, ZeRO 0\n" in one
    assert "stage" not in one and "idle" not in one


def saved_bytes(layers: int, tp: int, flags: list[str]) -> tuple[int, float]:
    """Bytes that autograd keeps of a forward pass through the blocks; what a block is said to."""
    run = parse_run(
        [
            *("--num-layers", str(layers), "--hidden-size", "64", "--num-attention-heads", "4"),
            *("--seq-length", "32", "--lr", "1e-3", "--micro-batch-size", "4", "--data-path", "x"),
            *("--train-iters", "10", "--selection", "clm", TP, str(tp), *flags),
        ],
        tp,
    )
    shape = run.shape(257)
    policy = build_policy(run.selection, SelectionState(alpha=0.0), Peers(0, 1, None), 1)
    model = build_model(run, shape, build_mesh(tp, 1), policy, Recorder(), range(layers))
    model = model.to(run.dtype).train()
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens_MU = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.run(Batch.of(tokens_MU, torch.ones(4, 32, dtype=torch.bool)))
    return sum(storage.nbytes() for storage in kept.values()), block_activations(run, shape)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_block_keeps_what_is_told(tp: int) -> None:
    cases = [
        [],
        ["--bf16"],
        ["--ffn-hidden-size", "96"],
        ["--hidden-dropout", "0.1"],
        ["--attention-dropout", "0.1"],
        ["--architecture", "llama", "--num-query-groups", "2"],
    ]
    if tp > 1:
        cases += [["--sequence-parallel"], ["--sequence-parallel", "--bf16"]]

    def fn(rank: int) -> list[tuple[int, float]]:
        init_distributed()
        found = []
        for flags in cases:
            (small, told), (large, _) = saved_bytes(2, tp, flags), saved_bytes(3, tp, flags)
            found.append((large - small, told))
        return found

    for flags, (kept, told) in zip(cases, run_ranks(tp, fn)[0], strict=True):
        if "llama" in flags:
            # Without CUDA's fused kernel, each of two RMSNorms keeps its scaled input, too.
            told += 4 * 32 * 2 * 64 * torch.float32.itemsize
        assert told == pytest.approx(kept, rel=0.02), flags


def memory(*flags: str | int, world: int = 8) -> MemoryEstimate:
    argv = ["--data-path", "x", "--model-size", "350M", "--global-batch-size", "256"]
    run = parse_run(later_wins([*argv, *map(str, flags)]), world)
    shape = run.shape(50_257)
    state = SelectionState(alpha=0.0)
    flops = build_flops(run, shape, state)
    return estimate_memory(run, shape, plan_stages(run, shape, flops, step_work(run)), flops)


N = 354_871_296
"""Parameters of the 350M model, padded vocabulary."""


def test_zero_spreads_over_the_data_parallel_ranks() -> None:
    # bytes a parameter: weights, gradients, optimizer
    for flags, shares in (
        (("--zero-stage", 0), (4, 4, 8)),
        (("--zero-stage", 1), (4, 4, 12 / 8)),
        (("--zero-stage", 2), (4, 4 / 8, 12 / 8)),
        (("--zero-stage", 3), (4 / 8, 4 / 8, 12 / 8)),
        (("--bf16",), (2, 4, 12 / 8)),
        (("--bf16", "--zero-stage", 3), (2 / 8, 4 / 8, 12 / 8)),
        (("--zero-stage", 2, "--cpu-offload"), (4, 4 / 8, 0)),
    ):
        found = memory(*flags)
        assert (found.weights, found.gradients, found.optimizer) == pytest.approx(
            [N * share for share in shares]
        ), flags


def test_tensor_ranks_share_weights_activations_and_head() -> None:
    one, two = memory("--zero-stage", 0), memory(TP, 2)
    spread = memory(TP, 2, "--sequence-parallel")
    assert one.weights / 2 < two.weights < one.weights / 2 * 1.01  # norms and positions are whole
    assert one.activations / 2 < two.activations < one.activations
    assert spread.activations == pytest.approx(one.activations / 2)
    assert two.head < one.head
    assert spread.weights == two.weights and spread.optimizer == two.optimizer


def test_a_stage_counts_what_is_in_flight() -> None:
    """24 blocks of 350M over four stages: stage 0 has four micro-steps under way."""
    one = memory("--zero-stage", 0)
    a_block = one.activations / 24
    hidden = 8 * 1024 * 1024 * 4
    cut = memory(PP, 4, "--pipeline-split", "6,6,6,6")
    assert cut.stage == 0
    assert cut.activations == pytest.approx(4 * (6 * a_block + hidden))
    # As many micro-steps as there are, at most.
    few = memory(
        PP, 4, "--pipeline-split", "6,6,6,6", "--global-batch-size", 32, "--eslm-alpha", 0.3
    )
    assert few.activations == pytest.approx(2 * (6 * a_block + hidden))
    # A stage behind it also keeps what it received.
    third = memory(PP, 4, "--pipeline-split", "1,1,21,1")
    assert third.stage == 2
    assert third.activations == pytest.approx(2 * (21 * a_block + 2 * hidden))


def test_checkpoints_keep_inputs_and_one_group() -> None:
    hidden = 8 * 1024 * 1024 * 4
    a_block = memory("--zero-stage", 0).activations / 24
    for interval, groups in ((1, 24), (4, 1 + 6), (23, 2)):  # one block before the selector
        found = memory("--activation-checkpoint-interval", interval)
        assert found.activations == pytest.approx(groups * hidden + interval * a_block)
    cut = memory(PP, 4, "--pipeline-split", "20,2,1,1", "--activation-checkpoint-interval", 5)
    # The first stage: blocks 0 | 1-5 | 6-10 | 11-15 | 16-19, and what it hands on, four times.
    assert cut.stage == 0
    assert cut.activations == pytest.approx(4 * (5 + 1) * hidden + 5 * a_block)


def test_the_head_counts_where_it_is() -> None:
    """Logits kept or not, the gradient of the tied weight, two chunks, three hidden states."""
    tokens, vocab, width = 8 * 1024, 50_304, 1024
    base = 4 * vocab * width + 2 * 128 * 2**20 + 3 * tokens * width * 4
    keep, again = memory("--head-logits", "keep"), memory("--head-logits", "recompute")
    assert again.head == pytest.approx(base)
    assert keep.head == pytest.approx(base + 4 * tokens * vocab)
    # A first stage that scores has chunks and hidden states, one that does not has nothing.
    scoring = memory(PP, 4, "--pipeline-split", "21,1,1,1")
    assert scoring.stage == 0
    assert scoring.head == pytest.approx(2 * 128 * 2**20 + 2 * tokens * width * 4)
    blind = memory(PP, 4, "--pipeline-split", "21,1,1,1", "--selection", "random")
    assert (blind.stage, blind.head) == (0, 0.0)


def test_a_reference_model_counts_where_the_labels_are() -> None:
    """Weights of 350M and what one of its blocks holds, in the last of two stages."""
    run = parse_run(
        [
            *("--data-path", "x", "--model-size", "350M", "--global-batch-size", "256", "--bf16"),
            *("--selection", "rho1", "--reference", "y", PP, "2"),
            *("--activation-checkpoint-interval", "1"),
        ],
        8,
    )
    shape = run.shape(50_257)
    state = SelectionState(alpha=0.1)
    alone = build_flops(run, shape, state)
    flops = dataclasses.replace(alone, reference=shape)
    plan = plan_stages(run, shape, alone, step_work(run))
    without, beside = (estimate_memory(run, shape, plan, each) for each in (alone, flops))
    tokens, width = 8 * 1024, 1024
    expected = 2 * (N + tokens * (3 * width + 2 * 4 * width)) + 2 * 128 * 2**20
    assert without.reference == 0.0
    assert (beside.stage, beside.reference) == (1, pytest.approx(expected))
    # A cheaper last stage holds fewer blocks; the plan had to know of it.
    assert plan_stages(run, shape, flops, step_work(run)).num_blocks[1] < plan.num_blocks[1]


ALIGNED = (
    *("--data-path", "x", "--num-layers", "6", "--hidden-size", "64", "--num-attention-heads"),
    *("4", "--seq-length", "128", "--lr", "1e-3", "--micro-batch-size", "8", "--train-iters", "10"),
    *("--selection", "greats"),
)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("vocab", [257, 4000])
@pytest.mark.parametrize("flags", [(), ("--bf16",), ("--num-layers", "12")], ids=" ".join)
def test_the_pass_of_greats_holds_what_is_told(flags: tuple[str, ...], vocab: int) -> None:
    """The profiler's peak of one pass over 8 candidates and 4 validation rows."""
    run = parse_run(later_wins([*ALIGNED, *flags]), 1)
    shape, mesh = run.shape(vocab), build_mesh(1, 1)
    policy = build_policy(run.selection, SelectionState(alpha=0.1), Peers(0, 1, None), 1)
    model = build_model(run, shape, mesh, policy, Recorder(), range(shape.num_layers))
    model = model.to(run.dtype)

    def rows(number: int) -> Batch:
        tokens_MU = torch.zeros(number, 129, dtype=torch.int64)
        return Batch.of(tokens_MU, torch.ones(number, 128, dtype=torch.bool))

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradient_products(model, rows(8), rows(4))
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    told = alignment_bytes(run, shape, (8, 4))
    assert told == pytest.approx(peak, rel=0.15)
    # It takes the place of what training does then, so only the difference comes on top.
    flops = build_flops(run, shape, policy.state)
    plain = dataclasses.replace(flops, alignment_rows=None)
    plan = plan_stages(run, shape, flops, step_work(run))
    found, alone = (estimate_memory(run, shape, plan, each) for each in (flops, plain))
    excess = max(0.0, told - alone.activations - alone.head)
    assert (found.alignment, alone.alignment) == (excess, 0.0)
    assert found.total == pytest.approx(alone.total + excess)
    assert (excess > 0) == (vocab == 257)
