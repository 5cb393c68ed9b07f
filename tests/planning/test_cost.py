"""The cost of a step where everything but one thing is free, and memory as --dry-run has it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.memory import estimate_memory
from megatron_eslm.cost.of_run import step_work
from megatron_eslm.planning.cost import StepCost, step_cost
from megatron_eslm.planning.hardware import Machine, machine_of
from megatron_eslm.planning.pipeline_time import pipeline_seconds
from megatron_eslm.planning.request import GPT2_VOCAB_SIZE
from megatron_eslm.planning.setting import Setting, rank_work

A100 = machine_of("a100-80g", "infiniband-hdr")
ONLY_PRODUCTS = dataclasses.replace(
    A100,
    efficiency=1.0,
    memory_bandwidth=math.inf,
    intra_bandwidth=math.inf,
    node_bandwidth=math.inf,
    protocols=tuple(
        dataclasses.replace(
            p, base=0.0, hop_intra=0.0, hop_inter=0.0, tree_hop_intra=0.0, tree_hop_inter=0.0
        )
        for p in A100.protocols
    ),
    launch_seconds=0.0,
    wait_seconds=0.0,
)


def setting(*flags: str | int, world: int = 1, size: str = "124M", bf16: bool = True) -> Setting:
    half = ["--bf16"] if bf16 else []
    words = ["--data-path", "x", "--model-size", size, *half, *map(str, flags)]
    return Setting.of(parse_run(words, world), GPT2_VOCAB_SIZE)


def cost(*flags: str | int, world: int = 1, machine: Machine = A100, **more: bool) -> StepCost:
    return step_cost(setting(*flags, world=world), machine, **more)


@pytest.mark.parametrize(
    "flags, world",
    [
        (("--selection", "clm"), 1),
        (("--eslm-alpha", "0.25"), 1),
        (("--eslm-alpha", "0.25", "--eslm-proxy-stride", "8"), 1),
        (("--selection", "random", "--eslm-level", "token"), 1),
        (("--eslm-alpha", "0.25", "--activation-checkpoint-interval", "1"), 1),
        (("--eslm-alpha", "0.25", "--head-logits", "recompute"), 1),
        (("--eslm-alpha", "0.25", "--tensor-model-parallel-size", "2"), 2),
        (("--eslm-alpha", "0.25", "--eslm-scope", "local"), 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_products_alone_take_what_the_ledger_counts(flags: tuple[str, ...], world: int) -> None:
    found = cost(*flags, world=world, machine=ONLY_PRODUCTS)
    flops = found.setting.flops.executed(found.setting.work)
    assert found.seconds == pytest.approx(flops / (world * ONLY_PRODUCTS.peak_flops), rel=1e-6)
    again = found.setting.flops.blocks_recomputed or found.setting.flops.logits_recomputed
    assert (found.mfu < 0.999) if again else (found.mfu == pytest.approx(1.0, rel=1e-6))


def test_a_pipeline_takes_its_schedule() -> None:
    found = cost(
        *("--pipeline-model-parallel-size", "4", "--global-batch-size", "120"),
        world=4,
        machine=ONLY_PRODUCTS,
    )
    steps = found.setting.micro_steps
    assert steps == 9 == found.setting.run.gradient_accumulation_steps - 1
    proxy = found.setting.flops.scoring(found.setting.work)
    flops = [each - proxy / 4 for each in found.setting.plan.flops]
    seconds = [each / steps / ONLY_PRODUCTS.peak_flops for each in flops]
    assert [stage.busy for stage in found.stages] == pytest.approx(seconds, rel=1e-6)
    forward = [sum(stage.forward.values()) for stage in found.stages]
    backward = [sum(stage.backward.values()) for stage in found.stages]
    through = pipeline_seconds(forward, backward, steps)
    # All stages share in the proxy pass: of 10 micro-batches, one stage scores 3.
    share = 3 / 10
    assert found.seconds == pytest.approx(through + share * proxy / ONLY_PRODUCTS.peak_flops)
    assert found.bubble == pytest.approx(1 - sum(seconds) * steps / 4 / through, rel=1e-6)


def test_parts_add_up() -> None:
    for flags in ((), ("--pipeline-model-parallel-size", "2"), ("--zero-stage", "3")):
        found = cost("--eslm-alpha", "0.2", *flags, world=4)
        assert sum(found.parts.values()) == pytest.approx(found.seconds)
        assert all(seconds >= 0 for seconds in found.parts.values())


@pytest.mark.parametrize("tp, pp, zero, interval", [(1, 1, 3, 0), (2, 2, 1, 1), (1, 4, 1, 0)])
def test_memory_is_that_of_dry_run(tp: int, pp: int, zero: int, interval: int) -> None:
    found = setting(
        *("--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp),
        *("--zero-stage", zero, "--activation-checkpoint-interval", interval),
        world=8,
    )
    memory = estimate_memory(found.run, found.shape, found.plan, found.flops)
    assert found.memory == memory and found.work == step_work(found.run)


def test_the_rank_that_keeps_most() -> None:
    works = rank_work(setting("--eslm-alpha", "0.1", "--eslm-scope", "global", world=8))
    assert works.fair.tokens == works.largest.tokens == 12 * 1024
    assert works.fair.tokens_deep == pytest.approx(12 * 1024 * 86 / 96, abs=1)
    assert 1024 * 11.9 < works.largest.tokens_deep < 1024 * 12
    assert works.fair.tokens_trained < works.largest.tokens_trained < works.largest.tokens_deep
    for flags in (("--eslm-scope", "local"), ("--selection", "clm")):
        works = rank_work(setting(*flags, world=8))
        assert works.fair == works.largest
    alone = rank_work(setting("--eslm-alpha", "0.1", "--eslm-scope", "global"))
    assert alone.fair == alone.largest and alone.fair.tokens_deep == 10 * 1024
    by_token = rank_work(setting("--eslm-level", "token", world=8))
    ahead = setting("--global-batch-size", 960, world=8)
    assert (ahead.run.gradient_accumulation_steps, ahead.micro_steps) == (10, 9)
    for works in (by_token, rank_work(ahead)):  # whole micro-batches; tokens differ by chance
        assert works.fair.tokens_deep == works.largest.tokens_deep == 12 * 1024
        assert 1.0 < works.largest.tokens_trained / works.fair.tokens_trained < 1.01


def test_waiting_for_it_costs_what_selection_saves() -> None:
    batch = ("--global-batch-size", 960)
    clm = cost("--selection", "clm", *batch, world=8).seconds
    within = cost("--eslm-scope", "global", *batch, world=8)
    equal = step_cost(within.setting, A100, balanced=True).seconds
    ahead = cost(*batch, "--eslm-proxy-stride", 8, world=8)
    assert equal < clm < within.seconds
    assert 0.9 < ahead.seconds / clm < 0.95
    local = cost("--eslm-scope", "local", *batch, world=8)
    assert local.seconds == step_cost(local.setting, A100, balanced=True).seconds < clm


@pytest.mark.parametrize("pp", [1, 2])
def test_the_proxy_pass_is_once_a_step_and_only_where_something_is_dropped(pp: int) -> None:
    def proxy(*flags: str | int) -> float:
        layout = ("--pipeline-model-parallel-size", pp, "--eslm-scope", "step")
        found = cost(*layout, *flags, world=2, machine=ONLY_PRODUCTS)
        return found.once["selection: proxy pass"] * ONLY_PRODUCTS.peak_flops * 2

    batch = ("--global-batch-size", 240)
    of_240 = setting(*batch, "--eslm-scope", "step").flops.scoring(
        setting(*batch, "--eslm-scope", "step").work
    )
    assert proxy(*batch) == pytest.approx(of_240)
    assert proxy(*batch, "--eslm-alpha", 0.5) == pytest.approx(of_240)
    assert proxy("--global-batch-size", 480) == pytest.approx(2 * of_240)
    assert proxy(*batch, "--selection", "random") == proxy(*batch, "--eslm-alpha", 0) == 0


def test_better_machines_are_not_slower() -> None:
    flags = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    flags += ("--global-batch-size", 960)
    found = cost(*flags, world=32).seconds
    for change in (
        {"efficiency": 0.95},
        {"memory_bandwidth": 1e13},
        {"intra_bandwidth": 1e12},
        {"node_bandwidth": 1e12},
        {"launch_seconds": 0.0},
    ):
        assert cost(*flags, world=32, machine=dataclasses.replace(A100, **change)).seconds <= found
    slow = dataclasses.replace(A100, node_bandwidth=1e9)
    assert cost(*flags, world=32, machine=slow).seconds > 1.5 * found


def test_processes_share_cores() -> None:
    shared = dataclasses.replace(ONLY_PRODUCTS, cores=1.0)
    alone = cost("--selection", "clm", machine=ONLY_PRODUCTS).seconds
    assert cost("--selection", "clm", machine=shared).seconds == pytest.approx(alone)
    for flags in ((), ("--tensor-model-parallel-size", "2")):
        two = cost(*flags, "--selection", "clm", world=2, machine=shared)
        # Two halves of the work on one core; the vocabulary is padded a little more with TP.
        assert two.seconds == pytest.approx(alone, rel=1e-3)
        own = cost(*flags, "--selection", "clm", world=2, machine=ONLY_PRODUCTS)
        assert own.seconds == pytest.approx(alone / 2, rel=1e-3)
        assert two.parts["waiting for a core"] == pytest.approx(two.seconds - own.seconds)
