"""Where a pipeline is cut: against all ways to cut it, by what moves blocks, and by real stages."""

from __future__ import annotations

import random
from itertools import accumulate, combinations, pairwise
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron_eslm.config.layouts import early_exit_layers
from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import StagePlan, balanced_split, plan_stages, plan_text
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.model.arithmetic import num_params, num_params_block, stage_params
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from megatron_eslm.training.build import build_model
from megatron_eslm.training.loop import Trainer
from tests.argv import later_wins
from tests.harness import run_ranks

from .runs import train, words
from .test_flops import UNKNOWN_TO_TORCH

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"


def planned(
    *flags: str | int, vocab_size: int = 50_257, world: int = 24
) -> tuple[StagePlan, RunConfig, ModelShape]:
    base = ("--data-path", "x", "--model-size", "124M", "--global-batch-size", "1152")
    run = parse_run(later_wins([*base, *map(str, flags)]), world)
    shape = run.shape(vocab_size)
    state = SelectionState(alpha=0.0)
    return (
        plan_stages(run, shape, build_flops(run, shape, state), step_work(run)),
        run,
        shape,
    )


def goals(blocks: list[float], split: tuple[int, ...], last: float) -> tuple[float, float]:
    """What is minimised, written out: the largest stage, then the sum of squares."""
    bounds = [0, *accumulate(split)]
    costs = [sum(blocks[a:b]) for a, b in pairwise(bounds)]
    costs[-1] += last
    return max(costs), sum(cost**2 for cost in costs)


def all_splits(blocks: int, stages: int) -> list[tuple[int, ...]]:
    cuts = combinations(range(1, blocks), stages - 1)
    return [tuple(b - a for a, b in pairwise((0, *cut, blocks))) for cut in cuts]


@pytest.mark.parametrize("seed", range(200))
def test_no_split_is_better(seed: int) -> None:
    rng = random.Random(seed)
    blocks = [float(rng.randint(1, 9)) for _ in range(rng.randint(1, 9))]
    stages = rng.randint(1, len(blocks))
    last = float(rng.randint(0, 12))
    at_least = rng.randint(0, len(blocks) - stages + 1)
    split = balanced_split(blocks, stages, last=last, at_least=at_least)
    possible = [s for s in all_splits(len(blocks), stages) if s[0] >= at_least]
    assert split in possible
    best = min(goals(blocks, other, last) for other in possible)
    assert goals(blocks, split, last) == best


def test_a_smaller_beginning_is_given_up_where_a_later_stage_exceeds_it() -> None:
    # (1, 2, 1) has the smallest maximum of the first two stages, but the last one costs 10 anyway.
    assert balanced_split([3, 2, 2, 1], 3, last=9) == (1, 2, 1)
    assert balanced_split([1, 1, 1, 1], 2, last=0) == (2, 2)
    assert balanced_split([1, 1, 1, 1], 1, last=7) == (4,)
    assert balanced_split([1, 1, 1, 1], 4, last=7, at_least=1) == (1, 1, 1, 1)


@pytest.mark.parametrize("flags", ["", "--selection clm", "--selection random", "--eslm-alpha 0.2"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 12])
def test_stages_add_up_to_the_model(stages: int, flags: str) -> None:
    plan, run, shape = planned(PP, stages, *flags.split())
    state = SelectionState(alpha=0.0)
    executed = build_flops(run, shape, state).executed(step_work(run))
    assert sum(plan.flops) == pytest.approx(executed, rel=1e-12)
    assert [i for s in range(stages) for i in plan.blocks(s)] == list(range(12))
    assert min(plan.num_blocks) >= 1
    tied = shape.padded_vocab_size * shape.hidden_size if stages > 1 else 0
    assert sum(plan.num_params) == num_params(shape) + tied


def test_a_large_vocabulary_moves_blocks_away_from_the_last_stage() -> None:
    for flags in ((), ("--selection", "clm"), ("--selection", "random")):
        large, _, _ = planned(PP, 4, *flags)
        small, _, _ = planned(PP, 4, *flags, vocab_size=257)
        assert large.num_blocks[-1] < small.num_blocks[-1], (large.num_blocks, small.num_blocks)
    assert planned(PP, 4, "--selection", "clm", vocab_size=257)[0].num_blocks == (3, 3, 3, 3)
    # The head, 2DV forward and twice that backward a token, costs 4.3 of these blocks.
    assert planned(PP, 4, "--selection", "clm")[0].num_blocks == (3, 4, 4, 1)


def test_all_stages_share_in_scoring_and_it_moves_no_block() -> None:
    exact, _, _ = planned(PP, 3, "--model-size", "350M")
    coarse, _, _ = planned(PP, 3, "--model-size", "350M", "--eslm-proxy-stride", 64)
    assert exact.num_blocks == coarse.num_blocks
    more = [a - b for a, b in zip(exact.flops, coarse.flops, strict=True)]
    assert more[0] > 0 and more == pytest.approx([more[0]] * 3)
    without, _, _ = planned(PP, 3, "--model-size", "350M", "--selection", "random")
    assert exact.early_exit == coarse.early_exit == 1 and without.early_exit == 0


def test_dropped_rows_move_blocks_behind_the_selector() -> None:
    flags = (PP, 2, "--model-size", "350M", "--eslm-proxy-layers", 8)
    few, _, _ = planned(*flags, "--eslm-alpha", 0.05)
    many, _, _ = planned(*flags, "--eslm-alpha", 0.6)
    assert many.num_blocks[0] < few.num_blocks[0]


def test_the_early_exit_stays_in_the_first_stage() -> None:
    free, _, _ = planned(PP, 6)
    assert free.num_blocks[0] < 5
    assert planned(PP, 6, "--eslm-proxy-layers", 5)[0].num_blocks[0] == 5
    assert planned(PP, 6, "--eslm-proxy-layers", 7)[0].num_blocks == (7, 1, 1, 1, 1, 1)


def test_the_split_that_was_asked_for() -> None:
    balanced, _, _ = planned(PP, 4)
    given, _, _ = planned(PP, 4, "--pipeline-split", "6,2,2,2")
    assert given.num_blocks == (6, 2, 2, 2)
    assert given.blocks(1) == range(6, 8)
    assert max(given.flops) > max(balanced.flops)
    assert sum(given.flops) == pytest.approx(sum(balanced.flops))


def test_the_table() -> None:
    flags = (PP, 4, "--eslm-proxy-layers", 2, "--pipeline-split", "3,4,4,1")
    plan, _, shape = planned(*flags)
    lines = plan_text(plan).splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["stage", "blocks", "FLOPs", "/", "step", "share", "parameters"]
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[1:5]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert lines[1].endswith("  embedding, early exit behind block 1")
    assert lines[4].endswith(f"{plan.num_params[-1]:,}  head") and "11 (1)" in lines[4]
    assert lines[2].split()[:3] == ["1", "3-6", "(4)"]
    assert plan.num_params[1] == 4 * num_params_block(shape)
    mean = sum(plan.flops) / 4
    assert lines[5] == f"the most expensive stage costs {max(plan.flops) / mean:.2f} x the mean"
    single, _, _ = planned()
    assert "embedding, early exit behind block 0, head" in plan_text(single)


def test_parameters_are_those_of_real_stages() -> None:
    flags = "--num-layers 5 --hidden-size 48 --num-attention-heads 4 --seq-length 16 --lr 1e-3 "
    flags += "--ffn-hidden-size 104 --micro-batch-size 1 --train-iters 10 --data-path x"
    cuts = [range(5), range(2), range(2, 3), range(3, 5)]

    def fn(rank: int, tp: int) -> list[tuple[int, int]]:
        init_distributed()
        mesh = build_mesh(tp, 1)
        run = parse_run([*flags.split(), TP, str(tp)], tp)
        shape = run.shape(257)
        policy = build_policy(run.selection, SelectionState(alpha=0.1), Peers(0, 1, None), 0)
        found = []
        for blocks in cuts:
            stage = build_model(run, shape, mesh, policy, Recorder(), blocks)
            ends = {"first": blocks.start == 0, "last": blocks.stop == 5}
            held = sum(parameter.numel() for parameter in stage.parameters())
            found.append((held, stage_params(shape, len(blocks), **ends, tp=tp)))
        return found

    for tp in (1, 2):
        for ranks in run_ranks(tp, fn, tp):
            for held, told in ranks:
                assert held == told


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--eslm-proxy-layers", "2", "--eslm-proxy-stride", "4"),
        ("--selection", "clm"),
        ("--selection", "random"),
        ("--head-logits", "recompute"),
        ("--pipeline-split", "2,1"),
    ],
    ids=" ".join,
)
def test_a_stage_runs_what_the_plan_says(
    data: list[str], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """torch's own count of the products on each rank of a pipeline."""

    def fn(rank: int) -> tuple[int, StagePlan]:
        found: list[tuple[int, StagePlan]] = []

        def count(trainer: Trainer) -> None:
            run, ordinary = trainer.run, trainer._step
            plan = plan_stages(run, run.shape(257), trainer.flops, step_work(run))

            def step(*args):
                with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as mode:
                    outcome = ordinary(*args)
                found.append((mode.get_total_flops(), plan))
                return outcome

            trainer._step = step

        argv = words(data, "--eslm-alpha", 0.3, PP, 2, "--global-batch-size", 16, *flags, iters=2)
        train([*argv, "--seq-length", "64"], None, count)
        return found[0]

    for stage, (counted, plan) in enumerate(run_ranks(2, fn)):
        assert counted == pytest.approx(plan.flops[stage], rel=0.01)


def test_the_early_exit_is_that_of_the_policy() -> None:
    for flags, depth in (
        ("--eslm-proxy-layers 2", 2),
        ("--eslm-level token", 0),
        ("--selection random", 0),
        ("--selection clm", 0),
    ):
        run = parse_run(f"--data-path x --model-size 124M {flags}".split(), 1)
        assert early_exit_layers(run.selection) == depth
