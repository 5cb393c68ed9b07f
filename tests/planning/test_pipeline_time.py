"""The time of 1F1B against an execution of DeepSpeed's own schedule, instruction by instruction."""

from __future__ import annotations

import random

import pytest
from deepspeed.runtime.pipe import schedule

from megatron_eslm.planning import pipeline_time
from megatron_eslm.planning.pipeline_time import pipeline_seconds

SENDS = {schedule.SendActivation: (1, "activation"), schedule.SendGrad: (-1, "gradient")}
RECEIVES = {schedule.RecvActivation: (-1, "activation"), schedule.RecvGrad: (1, "gradient")}


def executed(
    forward: list[float],
    backward: list[float],
    micro_steps: int,
    down: list[float],
    up: list[float],
) -> float:
    """Walk through every stage's list of instructions; a send and its receive happen together."""
    stages = len(forward)
    programs = [
        [
            instruction
            for step in schedule.TrainSchedule(micro_steps, stages, stage).steps()
            for instruction in step
        ]
        for stage in range(stages)
    ]
    at, now = [0] * stages, [0.0] * stages

    def current(stage: int) -> object:
        return programs[stage][at[stage]] if at[stage] < len(programs[stage]) else None

    while any(current(stage) is not None for stage in range(stages)):
        moved = False
        for stage in range(stages):
            instruction = current(stage)
            kind = type(instruction)
            if instruction is None or kind in RECEIVES:
                continue
            if kind in SENDS:
                direction, what = SENDS[kind]
                other = stage + direction
                if RECEIVES.get(type(current(other))) != (-direction, what):
                    continue
                cost = down[stage] if direction == 1 else up[other]
                now[stage] = now[other] = max(now[stage], now[other]) + cost
                at[other] += 1
            elif kind is schedule.ForwardPass:
                now[stage] += forward[stage]
            elif kind is schedule.BackwardPass:
                now[stage] += backward[stage]
            at[stage] += 1
            moved = True
        assert moved, "the schedule hangs"
    return max(now)


@pytest.mark.parametrize("seed", range(60))
def test_the_schedule_executed(seed: int) -> None:
    rng = random.Random(seed)
    stages, micro_steps = rng.randint(1, 7), rng.randint(1, 12)
    forward = [rng.uniform(0.1, 2) for _ in range(stages)]
    backward = [rng.uniform(0.1, 4) for _ in range(stages)]
    down = [rng.choice([0.0, rng.uniform(0, 1)]) for _ in range(stages - 1)]
    up = [rng.choice([0.0, rng.uniform(0, 1)]) for _ in range(stages - 1)]
    expected = executed(forward, backward, micro_steps, down, up)
    found = pipeline_seconds(forward, backward, micro_steps, activations=down, gradients=up)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stages, micro_steps", [(1, 3), (2, 1), (4, 8), (8, 3)])
def test_equal_stages(stages: int, micro_steps: int) -> None:
    found = pipeline_seconds([1.0] * stages, [2.0] * stages, micro_steps)
    assert found == pytest.approx(3.0 * (micro_steps + stages - 1))


@pytest.mark.parametrize("seed", range(10))
def test_many_micro_steps_need_not_be_walked_through(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    stages = rng.randint(2, 5)
    costs = [[rng.uniform(0.5, 1.5) for _ in range(stages)] for _ in range(2)]
    links = {
        "activations": [rng.uniform(0, 0.3) for _ in range(stages - 1)],
        "gradients": [rng.uniform(0, 0.3) for _ in range(stages - 1)],
    }
    whole = pipeline_seconds(*costs, 400, **links)
    monkeypatch.setattr(pipeline_time, "MOST_CELLS", 0)
    assert pipeline_seconds(*costs, 400, **links) == pytest.approx(whole, rel=5e-3)
